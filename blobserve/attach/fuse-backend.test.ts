import { type ChildProcess, execFile, execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { closeSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { type FileHandle, open, readdir, readFile, stat, unlink, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { ServerAnswer, ServerCommand } from '../../test/fuse-server-process.js';
import { AttachError } from './backend.js';
import { mountFuse, openFuse, probeFuse, unmountFuse } from './fuse-mount.js';

const probe = await probeFuse();
const reason = process.getuid?.() !== 0 ? 'mounting needs root' : probe.available ? undefined : probe.reason;
if (reason !== undefined) console.warn(`FUSE tests are skipped: ${reason}`);

const require = createRequire(import.meta.url);
const VITE_NODE = path.join(path.dirname(require.resolve('vite-node/package.json')), 'vite-node.mjs');
const SERVER = path.resolve(import.meta.dirname, '../../test/fuse-server-process.ts');
const CHECKOUT = path.resolve(import.meta.dirname, '../..');

/** A serving process: commands in, answers out. */
class Server {
  readonly #child: ChildProcess;
  readonly #pending = new Map<
    number,
    { resolve: (answer: ServerAnswer) => void; reject: (error: Error) => void }
  >();
  #lastId = 0;

  constructor(descriptor: number) {
    this.#child = spawn(process.execPath, [VITE_NODE, SERVER], {
      cwd: CHECKOUT,
      stdio: ['ignore', 'ignore', 'inherit', descriptor, 'ipc'],
    });
    this.#child.on('message', (answer: ServerAnswer) => {
      const pending = this.#pending.get(answer.id);
      this.#pending.delete(answer.id);
      if (answer.error === undefined) pending?.resolve(answer);
      else pending?.reject(new Error(answer.error));
    });
    this.#child.on('exit', () => {
      for (const { reject } of this.#pending.values()) reject(new Error('the serving process ended'));
    });
  }

  send(command: ServerCommand): Promise<ServerAnswer> {
    const id = ++this.#lastId;
    return new Promise((resolve, reject) => {
      this.#pending.set(id, { resolve, reject });
      this.#child.send({ id, command });
    });
  }

  async kill(): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    const ended = new Promise((resolve) => this.#child.once('exit', resolve));
    this.#child.kill('SIGKILL');
    await ended;
  }
}

/** Directory of everything these tests make. */
let work: string;
let mountPoint: string;
let erofs: string;
let descriptor: number;
let servers: Server[];

function mounts(): string[] {
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .map((line) => line.split(' ')[4] ?? '')
    .filter((place) => place.startsWith(work));
}

async function startServer(
  options: { attachTimeoutMs?: number; memoryLimitBytes?: number } = {},
): Promise<Server> {
  const server = new Server(descriptor);
  servers.push(server);
  await server.send({ do: 'serve', mountPoint, ...options });
  return server;
}

/** Bytes that are nowhere zero and nowhere repeat, the same for the same seed. */
function content(seed: string, size: number): Buffer {
  const blocks: Buffer[] = [];
  for (let at = 0; at < size; at += 64) blocks.push(createHash('sha512').update(`${seed} ${at}`).digest());
  return Buffer.concat(blocks, size);
}

function file(name: string, bytes: Buffer): string {
  const place = path.join(work, name);
  writeFileSync(place, bytes);
  return place;
}

async function attach(
  server: Server,
  layerId: number,
  place: string,
  { now = true, identifier = `erofs-nbd:${layerId}` } = {},
): Promise<string> {
  const { size } = await stat(place);
  const { device } = await server.send({ do: 'attach', layerId, identifier, path: place, size, now });
  expect(device?.path).toBe(path.join(mountPoint, `layer-${layerId}`));
  return device?.path ?? '';
}

async function readAt(handle: FileHandle, offset: number, length: number): Promise<Buffer> {
  const { buffer, bytesRead } = await handle.read(Buffer.alloc(length), 0, length, offset);
  return buffer.subarray(0, bytesRead);
}

/** mount(2) on the file itself, in a process of its own: mount(8) would put a loop device in between. */
const MOUNT_EROFS = `
  const koffi = require('koffi');
  const mount = koffi.load('libc.so.6').func('int mount(str source, str target, str type, ulong flags, str data)');
  if (mount(process.argv[1], process.argv[2], 'erofs', 1, '') !== 0) throw new Error('errno ' + koffi.errno());
`;

async function mountErofs(image: string): Promise<void> {
  await promisify(execFile)(process.execPath, ['-e', MOUNT_EROFS, image, erofs], {
    cwd: CHECKOUT,
    timeout: 10_000,
  });
}

async function umountErofs(): Promise<void> {
  await promisify(execFile)('umount', [erofs], { timeout: 10_000 });
}

function makeImage(name: string, source: string, ...options: string[]): string {
  const image = path.join(work, name);
  execFileSync('mkfs.erofs', ['--quiet', ...options, image, source], { stdio: ['ignore', 'ignore', 'pipe'] });
  return image;
}

/** Every path below a directory with the digest of its content. */
async function treeOf(directory: string): Promise<Map<string, string>> {
  const entries = await readdir(directory, { recursive: true, withFileTypes: true });
  const tree = new Map<string, string>();
  for (const entry of entries) {
    const place = path.join(entry.parentPath, entry.name);
    const digest = entry.isFile()
      ? createHash('sha256')
          .update(await readFile(place))
          .digest('hex')
      : 'directory';
    tree.set(path.relative(directory, place), digest);
  }
  return new Map([...tree].sort());
}

describe.skipIf(reason !== undefined)('the fuse backend', () => {
  beforeAll(() => {
    work = mkdtempSync(path.join(tmpdir(), 'fuse-backend-'));
    mountPoint = path.join(work, 'fuse');
    erofs = path.join(work, 'erofs');
    mkdirSync(mountPoint);
    mkdirSync(erofs);
  });

  afterAll(() => {
    expect(mounts()).toEqual([]);
    rmSync(work, { recursive: true });
  });

  beforeEach(() => {
    servers = [];
    descriptor = openFuse();
  });

  /** Ends the connection first: then whatever still waits for it fails, and nothing below can hang. */
  afterEach(async () => {
    for (const server of servers) await server.kill();
    closeSync(descriptor);
    for (const place of mounts().reverse()) {
      await promisify(execFile)('umount', ['-i', '--no-canonicalize', place], { timeout: 10_000 });
    }
  });

  test.each([
    ['bytes at hand', true],
    ['bytes that come later', false],
  ])('serves %s: contents, places, and exact sizes', async (_, now) => {
    // A multiple of 512 and of nothing more.
    const bytes = content('sizes', 3 * 1024 * 1024 + 512);
    const server = await startServer();
    const place = await attach(server, 5, file('sizes', bytes), { now });
    await mountFuse(descriptor, mountPoint);

    expect(await stat(place)).toMatchObject({ size: bytes.length, mode: 0o100400, uid: 0, gid: 0, ino: 21 });
    expect((await readFile(place)).equals(bytes)).toBe(true);
    const handle = await open(place, 'r');
    try {
      const places = Array.from({ length: 40 }, (_, index) => {
        const offset = (index * 7_919_993) % bytes.length;
        return { offset, length: 1 + ((index * 104_729) % 300_000) };
      });
      const parts = await Promise.all(places.map(({ offset, length }) => readAt(handle, offset, length)));
      parts.forEach((part, index) => {
        const { offset = 0, length = 0 } = places[index] ?? {};
        expect(part.equals(bytes.subarray(offset, offset + length))).toBe(true);
      });
      expect((await readAt(handle, bytes.length - 10, 100)).equals(bytes.subarray(-10))).toBe(true);
      expect(await readAt(handle, bytes.length, 100)).toHaveLength(0);
      expect(await readAt(handle, bytes.length + 5000, 100)).toHaveLength(0);
    } finally {
      await handle.close();
    }
    const { statistics } = await server.send({ do: 'statistics', layerId: 5 });
    expect(statistics).toMatchObject({ readErrors: 0, readsInFlight: 0, oldestReadMs: 0 });
    expect(statistics?.readBytes).toBeGreaterThan(bytes.length);
  });

  test('lists its layers, knows no other names, and lets nothing be changed', async () => {
    const server = await startServer();
    const place = await attach(server, 12, file('listed', content('listed', 4096)));
    await attach(server, 3, file('listed too', content('listed too', 4096)));
    await mountFuse(descriptor, mountPoint);

    expect((await readdir(mountPoint)).sort()).toEqual(['layer-12', 'layer-3']);
    for (const name of ['layer-4', 'layer-012', 'layer-', 'layer-9007199254740993', 'nothing']) {
      await expect(stat(path.join(mountPoint, name))).rejects.toMatchObject({ code: 'ENOENT' });
    }
    await expect(open(place, 'r+')).rejects.toMatchObject({ code: 'EROFS' });
    await expect(writeFile(path.join(mountPoint, 'new'), '')).rejects.toMatchObject({ code: 'EROFS' });
    await expect(unlink(place)).rejects.toMatchObject({ code: 'EROFS' });
  });

  test('a read that fails is EIO for that read alone', async () => {
    const bytes = content('failing', 1024 * 1024);
    const server = await startServer();
    const place = await attach(server, 1, file('failing', bytes));
    await mountFuse(descriptor, mountPoint);
    await server.send({ do: 'fail', layerId: 1, range: [500_000, 500_001] });
    const handle = await open(place, 'r');
    try {
      await expect(readAt(handle, 499_000, 4096)).rejects.toMatchObject({ code: 'EIO' });
      expect((await readAt(handle, 503_096, 4096)).equals(bytes.subarray(503_096, 507_192))).toBe(true);
      const { statistics } = await server.send({ do: 'statistics', layerId: 1 });
      expect(statistics).toMatchObject({ reads: 2, readBytes: 4096, readErrors: 1 });
      await server.send({ do: 'fail', layerId: 1, range: undefined });
      expect((await readAt(handle, 499_000, 4096)).equals(bytes.subarray(499_000, 503_096))).toBe(true);
    } finally {
      await handle.close();
    }
  });

  test('refuses a layer number or a size that cannot be, and the same layer twice', async () => {
    const server = await startServer();
    const place = file('odd', content('odd', 1000));
    await expect(attach(server, 1, place)).rejects.toThrow(/its 1000 bytes are not a multiple of 512/);
    const even = file('even', content('even', 1024));
    await expect(attach(server, 0, even)).rejects.toThrow(/not a whole number above 0/);
    await attach(server, 1, even);
    await expect(attach(server, 1, even)).rejects.toThrow(/layer 1 has a FUSE file already/);
  });

  test('reads beyond the bound on memory wait and are all answered; a layer that hangs does not stop another', async () => {
    const bytes = content('bounded', 8 * 1024 * 1024);
    const server = await startServer({ memoryLimitBytes: 2 * 1024 * 1024 });
    const stuck = await attach(server, 1, file('stuck', bytes), { now: false });
    const fine = await attach(server, 2, file('fine', bytes), { now: false });
    await mountFuse(descriptor, mountPoint);
    await server.send({ do: 'hold', layerId: 1, range: [0, bytes.length] });
    const [slow, quick] = [await open(stuck, 'r'), await open(fine, 'r')];
    try {
      const offsets = Array.from({ length: 3 }, (_, index) => index * 1024 * 1024);
      const waiting = offsets.map((offset) => readAt(slow, offset, 1024 * 1024));
      await server.send({ do: 'await-held', layerId: 1, count: 1 });
      expect((await readAt(quick, 4096, 1024 * 1024)).equals(bytes.subarray(4096, 4096 + 1024 * 1024))).toBe(
        true,
      );
      const { statistics } = await server.send({ do: 'statistics', layerId: 1 });
      expect(statistics?.readsInFlight).toBeGreaterThan(0);
      expect(statistics?.oldestReadMs).toBeGreaterThan(0);
      await server.send({ do: 'hold', layerId: 1, range: undefined });
      const parts = await Promise.all(waiting);
      expect(Buffer.concat(parts).equals(bytes.subarray(0, 3 * 1024 * 1024))).toBe(true);
    } finally {
      await slow.close();
      await quick.close();
    }
  });

  describe('after SIGKILL of the serving process, while another holds the descriptor,', () => {
    test('a new process answers blocked readers when their layer is attached again', async () => {
      const bytes = content('survives', 2 * 1024 * 1024);
      const image = file('survives', bytes);
      const first = await startServer();
      const place = await attach(first, 9, image);
      await mountFuse(descriptor, mountPoint);
      const handle = await open(place, 'r');
      try {
        await first.send({ do: 'hold', layerId: 9, range: [1_000_000, 1_100_000] });
        const blocked = [readAt(handle, 1_000_000, 50_000), readAt(handle, 1_050_000, 50_000)];
        await first.send({ do: 'await-held', layerId: 9, count: 2 });
        await first.kill();
        const late = readAt(handle, 0, 50_000);

        const second = await startServer();
        let settled = false;
        void Promise.race([...blocked, late]).then(
          () => (settled = true),
          () => (settled = true),
        );
        // Another layer first: its answer shows that the blocked reads have come in and wait.
        const other = await attach(second, 10, image);
        expect((await readFile(other)).equals(bytes)).toBe(true);
        expect(settled).toBe(false);

        const { device } = await second.send({
          do: 'attach',
          layerId: 9,
          identifier: 'erofs-nbd:9',
          path: image,
          size: bytes.length,
          now: true,
        });
        expect(device?.reconnected).toBe(true);
        expect((await Promise.all(blocked)).map((part) => part.length)).toEqual([50_000, 50_000]);
        expect(Buffer.concat(await Promise.all(blocked)).equals(bytes.subarray(1_000_000, 1_100_000))).toBe(
          true,
        );
        expect((await late).equals(bytes.subarray(0, 50_000))).toBe(true);
        expect((await readFile(place)).equals(bytes)).toBe(true);
      } finally {
        await handle.close();
      }
    });

    test('readers of a layer that is not attached again in time get EIO, and are served when it comes after all', async () => {
      const bytes = content('too late', 4096);
      const image = file('too late', bytes);
      const first = await startServer();
      const place = await attach(first, 2, image);
      await mountFuse(descriptor, mountPoint);
      const handle = await open(place, 'r');
      try {
        await first.kill();
        const second = await startServer({ attachTimeoutMs: 50 });
        await expect(readAt(handle, 0, 4096)).rejects.toMatchObject({ code: 'EIO' });
        await attach(second, 2, image);
        expect((await readAt(handle, 0, 4096)).equals(bytes)).toBe(true);
      } finally {
        await handle.close();
      }
    });

    test('a process that closes leaves its readers to the next one too', async () => {
      const bytes = content('handed over', 64 * 1024);
      const image = file('handed over', bytes);
      const first = await startServer();
      const place = await attach(first, 2, image);
      await mountFuse(descriptor, mountPoint);
      const handle = await open(place, 'r');
      try {
        await first.send({ do: 'hold', layerId: 2, range: [0, 1] });
        const blocked = readAt(handle, 0, 64 * 1024);
        await first.send({ do: 'await-held', layerId: 2, count: 1 });
        await first.send({ do: 'close' });
        // What the reader answers after that must not reach the kernel: the next process answers.
        await first.send({ do: 'hold', layerId: 2, range: undefined });
        const second = await startServer();
        await attach(second, 2, image);
        expect((await blocked).equals(bytes)).toBe(true);
      } finally {
        await handle.close();
      }
    });
  });

  describe('detach', () => {
    test('gives waiting readers EIO, takes the name away, and leaves other layers alone', async () => {
      const bytes = content('detached', 64 * 1024);
      const server = await startServer();
      const place = await attach(server, 1, file('detached', bytes));
      const other = await attach(server, 2, file('stays', bytes));
      await mountFuse(descriptor, mountPoint);
      const handle = await open(place, 'r');
      try {
        await server.send({ do: 'hold', layerId: 1, range: [0, 1] });
        const waiting = readAt(handle, 0, 4096);
        await server.send({ do: 'await-held', layerId: 1, count: 1 });
        const failed = expect(waiting).rejects.toMatchObject({ code: 'EIO' });
        await server.send({ do: 'detach', layerId: 1 });
        await failed;
        await server.send({ do: 'detach', layerId: 1 });
        await expect(readAt(handle, 8192, 4096)).rejects.toMatchObject({ code: 'EIO' });
        await expect(stat(place)).rejects.toMatchObject({ code: 'ENOENT' });
        expect((await readFile(other)).equals(bytes)).toBe(true);
      } finally {
        await handle.close();
      }
    });

    test('and another blob under the same number: who had the old one open never reads the new one', async () => {
      const [old, fresh] = [content('old', 64 * 1024), content('fresh', 128 * 1024)];
      const server = await startServer();
      const place = await attach(server, 1, file('old', old), { identifier: 'erofs-nbd:old' });
      await mountFuse(descriptor, mountPoint);
      const handle = await open(place, 'r');
      try {
        expect((await readAt(handle, 0, 4096)).equals(old.subarray(0, 4096))).toBe(true);
        await server.send({ do: 'detach', layerId: 1 });
        await attach(server, 1, file('fresh', fresh), { identifier: 'erofs-nbd:fresh' });
        await expect(readAt(handle, 0, 4096)).rejects.toMatchObject({ code: 'EIO' });
        expect((await readFile(place)).equals(fresh)).toBe(true);
        await expect(readAt(handle, 0, 4096)).rejects.toMatchObject({ code: 'EIO' });
      } finally {
        // The node it was opened on is a bad one now, and says so at the end too.
        await expect(handle.close()).rejects.toMatchObject({ code: 'EIO' });
      }
    });
  });

  test('unmounting ends the serving, and a later attach says so', async () => {
    const server = await startServer();
    const place = file('unmounted', content('unmounted', 4096));
    await attach(server, 1, place);
    await mountFuse(descriptor, mountPoint);
    expect(await readdir(mountPoint)).toEqual(['layer-1']);
    await unmountFuse(mountPoint);
    expect(mounts()).toEqual([]);
    await expect
      .poll(() => attach(server, 2, place).then(String, String))
      .toMatch(/the FUSE file system has been unmounted/);
  });

  test('a connection that was mounted before anybody served it is a fresh one: unknown names are unknown at once', async () => {
    const mounting = mountFuse(descriptor, mountPoint);
    await expect.poll(mounts).toEqual([mountPoint]);
    const server = await startServer();
    await mounting;
    const place = file('mounted first', content('mounted first', 4096));
    await expect(stat(path.join(mountPoint, 'layer-1'))).rejects.toMatchObject({ code: 'ENOENT' });
    await attach(server, 1, place);
    expect((await stat(path.join(mountPoint, 'layer-1'))).size).toBe(4096);
  });

  test('what mount and umount say is passed on', async () => {
    await expect(mountFuse(descriptor, path.join(work, 'absent'))).rejects.toThrow(AttachError);
    await expect(mountFuse(descriptor, path.join(work, 'absent'))).rejects.toThrow(/does not exist/);
    await expect(unmountFuse(erofs)).rejects.toThrow(/cannot unmount .*: umount: .*not mounted/);
  });

  describe('under EROFS', () => {
    let source: string;

    beforeAll(() => {
      source = path.join(work, 'source');
      mkdirSync(path.join(source, 'many'), { recursive: true });
      for (let index = 0; index < 200; index++) {
        writeFileSync(
          path.join(source, 'many', `file-${index}`),
          content(`file ${index}`, (index * 997) % 20_000),
        );
      }
      writeFileSync(path.join(source, 'random'), content('random', 3 * 1024 * 1024));
      writeFileSync(path.join(source, 'text'), 'the same words again and again\n'.repeat(60_000));
    });

    test.each([
      ['uncompressed', []],
      ['lz4', ['-zlz4']],
    ])('an %s image has the tree it was made of', async (name, options) => {
      const server = await startServer();
      const place = await attach(server, 1, makeImage(`tree-${name}`, source, ...options));
      await mountFuse(descriptor, mountPoint);
      await mountErofs(place);
      const [tree, expected] = [await treeOf(erofs), await treeOf(source)];
      expect(tree.size).toBeGreaterThan(200);
      expect(tree).toEqual(expected);
      await expect(unmountFuse(mountPoint)).rejects.toThrow(/busy/);
      await umountErofs();
      await unmountFuse(mountPoint);
      expect(mounts()).toEqual([]);
    });

    test('a failed read is an error and never zeros, wherever in the file it lies, and heals', async () => {
      const expected = readFileSync(path.join(source, 'random'));
      const image = makeImage('tree-failing', source);
      const start = readFileSync(image).indexOf(expected.subarray(0, 4096));
      expect(start).toBeGreaterThan(0);
      const server = await startServer();
      const place = await attach(server, 1, image, { now: false });
      await mountFuse(descriptor, mountPoint);
      await mountErofs(place);
      const handle = await open(path.join(erofs, 'random'), 'r');
      try {
        let failures = 0;
        for (const at of [70_000, 1_000_000, 2_500_000]) {
          await server.send({ do: 'fail', layerId: 1, range: [start + at, start + at + 1] });
          for (let offset = at - 65_000; offset < at + 500_000; offset += 4096) {
            // A read that begins before the bad place may come back short, as every read(2).
            const part = await readAt(handle, offset, 4096).catch(
              (error: NodeJS.ErrnoException) => error.code,
            );
            if (typeof part !== 'object') {
              expect(part).toBe('EIO');
              failures++;
            } else {
              expect(part.equals(expected.subarray(offset, offset + part.length))).toBe(true);
            }
          }
        }
        expect(failures).toBeGreaterThan(2);
        await server.send({ do: 'fail', layerId: 1, range: undefined });
        expect((await readFile(path.join(erofs, 'random'))).equals(expected)).toBe(true);
      } finally {
        await handle.close();
        await umountErofs();
      }
    });

    test('a reader killed while it waits leaves nothing wrong behind for the next', async () => {
      const expected = readFileSync(path.join(source, 'random'));
      const image = makeImage('tree-killed', source);
      const start = readFileSync(image).indexOf(expected.subarray(0, 4096));
      const server = await startServer();
      const place = await attach(server, 1, image);
      await mountFuse(descriptor, mountPoint);
      await mountErofs(place);
      await server.send({ do: 'hold', layerId: 1, range: [start + 1_000_000, start + 1_000_001] });
      const victim = spawn('cat', [path.join(erofs, 'random')], { stdio: 'ignore' });
      await server.send({ do: 'await-held', layerId: 1, count: 1 });
      const ended = new Promise((resolve) => victim.once('exit', resolve));
      victim.kill('SIGKILL');
      // Before 6.18 it ends only when its read has been answered.
      await server.send({ do: 'hold', layerId: 1, range: undefined });
      await ended;
      expect((await readFile(path.join(erofs, 'random'))).equals(expected)).toBe(true);
      await umountErofs();
    });

    test('SIGKILL of the serving process in the middle of a walk is not seen by the walker', async () => {
      const image = makeImage('tree-restarted', source, '-zlz4');
      const first = await startServer();
      const place = await attach(first, 1, image);
      await mountFuse(descriptor, mountPoint);
      await mountErofs(place);
      await first.send({ do: 'hold', layerId: 1, range: [1_000_000, 1_000_001] });
      const walk = treeOf(erofs);
      await first.send({ do: 'await-held', layerId: 1, count: 1 });
      await first.kill();
      const second = await startServer();
      await attach(second, 1, image);
      expect(await walk).toEqual(await treeOf(source));
      await umountErofs();
      expect(readdirSync(mountPoint)).toEqual(['layer-1']);
    });
  });
});
