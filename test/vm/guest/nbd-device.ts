/**
 * The nbd backend against a real kernel, run by test/vm/guest/system-tests.sh inside the test VM (or by hand as root on a
 * machine with nbd). Serving happens in processes of its own: this one reads the devices. Prints one line per check and
 * ends with status 1 at the first that fails.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { unlinkSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { type Interface, createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { inspect } from 'node:util';
import { execa } from 'execa';
import { NbdBackend } from '../../../blobserve/attach/nbd-backend.js';
import { probeNbd } from '../../../blobserve/attach/nbd-device.js';
import { listNbdDevices } from '../../../blobserve/attach/nbd-sysfs.js';
import type { BlobReader } from '../../../blobserve/readers/blob-reader.js';
import { silentLogger } from '../../../daemon/log.js';
import { pattern } from './pattern.js';

const MIB = 1024 * 1024;
const SIZE = 8 * MIB + 512;
const SERVER = fileURLToPath(new URL('./serve-device.js', import.meta.url));

/** A serving process. */
class Server {
  readonly #lines: AsyncIterator<string>;
  device = '';

  private constructor(
    readonly process: ChildProcess,
    lines: Interface,
  ) {
    this.#lines = lines[Symbol.asyncIterator]();
  }

  static async start(
    identifier: string,
    mode: 'memory' | 'slow' | 'stuck',
    wrapper: string[] = [],
  ): Promise<Server> {
    const [command = '', ...rest] = [...wrapper, process.execPath, SERVER, identifier, String(SIZE), mode];
    const child = spawn(command, rest, {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    return new Server(child, createInterface({ input: child.stdout }));
  }

  async attached(): Promise<'new' | 'reconnected'> {
    // What a stuck reader is asked for may be said first.
    for (;;) {
      const line = await this.line();
      const [word, device = '', how] = line.split(' ');
      if (word === 'attached') {
        this.device = device;
        return how === 'new' ? 'new' : 'reconnected';
      }
    }
  }

  async line(): Promise<string> {
    const result = await this.#lines.next();
    assert.ok(result.done !== true, 'the serving process ended');
    return result.value;
  }

  say(line: string): void {
    this.process.stdin?.write(`${line}\n`);
  }

  async detach(): Promise<void> {
    this.say('detach');
    while ((await this.line()) !== 'detached') {
      // Something said before.
    }
    this.process.stdin?.end();
    await once(this.process, 'exit');
  }

  async kill(): Promise<void> {
    this.process.kill('SIGKILL');
    await once(this.process, 'exit');
  }
}

/** Reads with dd, which takes O_DIRECT and tells EIO. Offsets and lengths are multiples of 512. */
async function read(device: string, offset: number, length: number, direct: boolean): Promise<Buffer> {
  const block = [1024 * 1024, 4096, 512].find((size) => offset % size === 0 && length % size === 0) ?? 512;
  const result = await execa(
    'dd',
    [
      `if=${device}`,
      `bs=${block}`,
      `skip=${offset / block}`,
      `count=${length / block}`,
      ...(direct ? ['iflag=direct'] : []),
      'status=none',
    ],
    { encoding: 'buffer', maxBuffer: 64 * MIB, reject: false },
  );
  if (result.failed) {
    throw new Error(Buffer.from(result.stderr).toString().trim());
  }
  return Buffer.from(result.stdout);
}

async function dropCaches(): Promise<void> {
  await execa('sh', ['-c', 'echo 3 > /proc/sys/vm/drop_caches']);
}

async function connected(): Promise<string[]> {
  return (await listNbdDevices()).flatMap((device) => device.identifier ?? []);
}

/** So that a failed check's devices are not taken for somebody else's. */
async function disconnectAll(): Promise<void> {
  const backend = await NbdBackend.open({ log: silentLogger });
  for (const identifier of await connected()) await backend.disconnect(identifier);
  await backend.close();
}

const checks: [string, () => Promise<void>][] = [
  [
    'nbd can be had through netlink',
    async () => {
      assert.deepEqual(await probeNbd(), { available: true, via: 'netlink' });
    },
  ],
  [
    'reads through the device are right, direct and buffered, up to the odd end',
    async () => {
      const server = await Server.start('erofs-nbd:right', 'memory');
      assert.equal(await server.attached(), 'new');
      for (const direct of [true, false]) {
        for (const [offset, length] of [
          [0, MIB],
          [2 * MIB, 6 * MIB],
          [8 * MIB - 4096, 4608],
          [4096, 512],
          [SIZE - 512, 512],
        ] as const) {
          const bytes = await read(server.device, offset, length, direct);
          assert.ok(bytes.equals(pattern(offset, length)), `${length} bytes at ${offset}, direct ${direct}`);
        }
      }
      server.say('statistics');
      const statistics = JSON.parse(await server.line()) as { readBytes: number; readErrors: number };
      assert.ok(statistics.readBytes >= 7 * MIB);
      assert.equal(statistics.readErrors, 0);
      const queue = `/sys/block/${server.device.slice(5)}`;
      // The kernel rounds it up to its ticks, of 10 ms at most.
      assert.match(await readFile(`${queue}/queue/io_timeout`, 'utf8'), /^25\d\n$|^260\n$/);
      assert.match(await readFile(`${queue}/queue/scheduler`, 'utf8'), /\[none\]/);
      assert.equal(await readFile(`${queue}/ro`, 'utf8'), '1\n');
      assert.equal(await readFile(`${queue}/queue/logical_block_size`, 'utf8'), '512\n');
      await server.detach();
      assert.deepEqual(await connected(), []);
    },
  ],
  [
    'one read that fails is EIO, the reads beside it are right',
    async () => {
      const server = await Server.start('erofs-nbd:eio', 'slow');
      await server.attached();
      // More than once: an I/O scheduler would join such neighbours now and then, and fail all of them.
      for (let round = 0; round < 4; round++) {
        const [before, bad, after] = await Promise.allSettled([
          read(server.device, MIB - 4096, 4096, true),
          read(server.device, MIB, 4096, true),
          read(server.device, MIB + 4096, 4096, true),
        ]);
        assert.ok(before.status === 'fulfilled', inspect(before));
        assert.ok(before.value.equals(pattern(MIB - 4096, 4096)));
        assert.ok(bad.status === 'rejected' && String(bad.reason).includes('Input/output error'));
        assert.ok(after.status === 'fulfilled', inspect(after));
        assert.ok(after.value.equals(pattern(MIB + 4096, 4096)));
      }
      await server.detach();
    },
  ],
  [
    'a blocked reader outlives kill -9 of its server, and reads right bytes from the next',
    async () => {
      const first = await Server.start('erofs-nbd:killed', 'stuck');
      await first.attached();
      const { device } = first;
      const blocked = read(device, 2 * MIB, MIB, true);
      while (!(await first.line()).startsWith(`stuck ${2 * MIB} `)) {
        // Something said before.
      }
      await first.kill();
      const late = read(device, 5 * MIB, MIB, false);
      await sleep(500);
      const second = await Server.start('erofs-nbd:killed', 'memory');
      assert.equal(await second.attached(), 'reconnected');
      const start = performance.now();
      assert.equal(second.device, device);
      assert.ok((await late).equals(pattern(5 * MIB, MIB)), 'the reader that came late');
      assert.ok((await blocked).equals(pattern(2 * MIB, MIB)), 'the reader in flight');
      const waited = Math.round(performance.now() - start);
      console.log(`    both readers were served within ${waited} ms of the reconnect`);
      // With io_timeout as the kernel has it, the reader in flight would have waited for 30 s.
      assert.ok(waited < 15_000);
      await second.detach();
      assert.deepEqual(await connected(), []);
    },
  ],
  [
    'a server that ends in peace leaves the device to the next',
    async () => {
      const first = await Server.start('erofs-nbd:handed', 'memory');
      await first.attached();
      first.process.stdin?.end();
      await once(first.process, 'exit');
      assert.deepEqual(await connected(), ['erofs-nbd:handed']);
      await dropCaches();
      const waiting = read(first.device, 0, MIB, false);
      const second = await Server.start('erofs-nbd:handed', 'slow');
      assert.equal(await second.attached(), 'reconnected');
      assert.ok((await waiting).equals(pattern(0, MIB)));
      await second.detach();
    },
  ],
  [
    'a device that is still being served is not taken over until its server is gone',
    async () => {
      const first = await Server.start('erofs-nbd:both', 'memory');
      await first.attached();
      const second = await Server.start('erofs-nbd:both', 'memory');
      await sleep(1500);
      assert.ok((await read(first.device, 0, 4096, true)).equals(pattern(0, 4096)), 'the first still serves');
      await first.kill();
      assert.equal(await second.attached(), 'reconnected');
      assert.ok(
        (await read(second.device, 8192, 4096, true)).equals(pattern(8192, 4096)),
        'the second serves',
      );
      await second.detach();
    },
  ],
  [
    'a blob of another size does not take over a device',
    async () => {
      const first = await Server.start('erofs-nbd:size', 'memory');
      await first.attached();
      await first.kill();
      const backend = await NbdBackend.open({ log: silentLogger });
      const attach = (size: number) =>
        backend.attach({ layerId: 1, identifier: 'erofs-nbd:size', reader: { ...NO_READER, size } });
      await assert.rejects(attach(4096), /has 8389120 bytes, its blob now 4096/);
      await assert.rejects(attach(1000), /1000 bytes are not a device/);
      assert.equal(await backend.disconnect('erofs-nbd:size'), true);
      assert.equal(await backend.disconnect('erofs-nbd:size'), false);
      await backend.close();
      assert.deepEqual(await connected(), []);
    },
  ],
  [
    'a device whose node is missing in /dev gets one',
    async () => {
      unlinkSync('/dev/nbd0');
      const server = await Server.start('erofs-nbd:node', 'memory');
      await server.attached();
      assert.equal(server.device, '/dev/nbd0');
      assert.ok((await read(server.device, 0, 4096, true)).equals(pattern(0, 4096)));
      await server.detach();
    },
  ],
  [
    'twelve devices at a time, more than the module made',
    async () => {
      const backend = await NbdBackend.open({ log: silentLogger });
      const devices = await Promise.all(
        Array.from({ length: 12 }, (_, index) =>
          backend.attach({
            layerId: index + 1,
            identifier: `erofs-nbd:many-${index}`,
            reader: { ...PATTERN_READER, size: (index + 1) * 65536 },
          }),
        ),
      );
      assert.equal(new Set(devices.map((device) => device.path)).size, 12);
      const contents = await Promise.all(devices.map((device) => read(device.path, 0, device.size, true)));
      for (const [index, bytes] of contents.entries()) {
        assert.ok(bytes.equals(pattern(0, (index + 1) * 65536)));
      }
      await Promise.all(devices.map((device) => device.detach()));
      await backend.close();
      assert.deepEqual(await connected(), []);
      assert.ok((await listNbdDevices()).every((device) => device.size === 0 && device.pid === undefined));
    },
  ],
  [
    'a connection that breaks under a living server is made anew',
    async () => {
      const server = await Server.start('erofs-nbd:broken', 'memory');
      await server.attached();
      for (let round = 1; round <= 3; round++) {
        server.say('break');
        assert.equal(await server.line(), 'broken');
        assert.ok((await read(server.device, round * MIB, 4096, true)).equals(pattern(round * MIB, 4096)));
      }
      server.say('statistics');
      const statistics = JSON.parse(await server.line()) as { reads: number };
      assert.ok(statistics.reads >= 3);
      await server.detach();
    },
  ],
  [
    'without netlink, which another network namespace does not show, the ioctls do',
    async () => {
      const server = await Server.start('erofs-nbd:ioctl', 'slow', ['unshare', '--net']);
      await server.attached();
      assert.ok((await read(server.device, 2 * MIB, 4 * MIB, false)).equals(pattern(2 * MIB, 4 * MIB)));
      assert.ok((await read(server.device, SIZE - 512, 512, true)).equals(pattern(SIZE - 512, 512)));
      await assert.rejects(read(server.device, MIB, 4096, true), /Input\/output error/);
      assert.equal(await readFile(`/sys/block/${server.device.slice(5)}/ro`, 'utf8'), '1\n');
      const second = await Server.start('erofs-nbd:ioctl-2', 'memory', ['unshare', '--net']);
      await second.attached();
      assert.notEqual(second.device, server.device);
      await second.detach();
      await server.detach();
      assert.ok((await listNbdDevices()).every((device) => device.size === 0 && device.pid === undefined));
    },
  ],
  [
    'a device of another tool is left alone, and is not in the way',
    async () => {
      const theirs = await Server.start('another-tool', 'memory');
      assert.equal(await theirs.attached(), 'new');
      const ours = await Server.start('erofs-nbd:beside', 'memory');
      assert.equal(await ours.attached(), 'new');
      assert.notEqual(ours.device, theirs.device);
      await ours.detach();
      // A start of ours looks at every device of the kernel.
      const backend = await NbdBackend.open({ log: silentLogger });
      assert.equal(await backend.disconnect('erofs-nbd:beside'), false);
      await backend.close();
      assert.ok((await connected()).includes('another-tool'));
      assert.ok((await read(theirs.device, 0, MIB, true)).equals(pattern(0, MIB)));
      await theirs.detach();
    },
  ],
  [
    'a device disconnected by someone else is noticed, and detaching it is no error',
    async () => {
      const server = await Server.start('erofs-nbd:stolen', 'memory');
      await server.attached();
      const backend = await NbdBackend.open({ log: silentLogger });
      assert.equal(await backend.disconnect('erofs-nbd:stolen'), true);
      await backend.close();
      await server.detach();
    },
  ],
];

const NO_READER: BlobReader = {
  size: 0,
  read: () => Promise.reject(new Error('never read')),
  readNow: () => false,
  close: () => Promise.resolve(),
};
const PATTERN_READER: BlobReader = {
  ...NO_READER,
  readNow(target, offset) {
    pattern(offset, target.length).copy(target);
    return true;
  },
};

for (const [index, [name, check]] of checks.entries()) {
  const start = performance.now();
  try {
    await check();
  } catch (error) {
    console.log(`not ok - ${name}`);
    console.log(error);
    console.log(await listNbdDevices());
    await disconnectAll();
    // What the failed one has left would spoil them.
    for (const [later] of checks.slice(index + 1))
      console.log(`skipped - ${later}: the check before it failed`);
    process.exit(1);
  }
  console.log(`ok - ${name} (${Math.round(performance.now() - start)} ms)`);
}
process.exit(0);
