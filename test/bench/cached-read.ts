/**
 * How fast a layer whose bytes are all at hand is read through EROFS on our FUSE server, next to the same image through a
 * loop device: every file of it, one after the other, by cat(1). The image is in the page cache both times, and what the
 * kernel keeps above it is cold: a fresh mount on a fresh loop device or a fresh layer in every round.
 *
 * Both images are made of some 150 MB of /usr/lib. Needs root, mkfs.erofs, losetup, and Linux >= 6.12 with EROFS.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  copyFileSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  statSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { mountFuse, openFuse, unmountFuse } from '../../blobserve/attach/fuse-mount.js';
import { MS_RDONLY, mountSync, unmountSync } from '../../blobserve/linux/mount.js';
import type { ServerAnswer, ServerCommand } from '../fuse-server-process.js';

const SOURCE = '/usr/lib';
const SOURCE_BYTES = 150e6;
/** Files of all places, not only of the first directories. */
const SOURCE_STRIDE = 11;
const LARGEST_FILE = 16e6;

export interface CachedReadResult {
  readonly image: 'uncompressed' | 'lz4hc';
  /** Bytes of the files. */
  readonly bytes: number;
  /** Medians, in milliseconds for all files. */
  readonly loopMs: number;
  readonly fuseMs: number;
  /** Speed through FUSE in parts of that through the loop device. */
  readonly ratio: number;
  readonly rounds: number;
}

/** Copies files until there are enough of them. */
function makeSource(directory: string): number {
  let bytes = 0;
  let index = 0;
  const files = readdirSync(SOURCE, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => path.join(entry.parentPath, entry.name))
    .sort();
  for (let place = 0; place < files.length && bytes < SOURCE_BYTES; place += SOURCE_STRIDE) {
    const file = files[place] ?? '';
    const { size } = lstatSync(file);
    if (size > LARGEST_FILE) continue;
    const target = path.join(directory, String(index % 100));
    mkdirSync(target, { recursive: true });
    copyFileSync(file, path.join(target, `${index++}-${path.basename(file)}`));
    bytes += size;
  }
  return bytes;
}

/** Milliseconds that cat takes for all files below a directory. */
async function readAll(directory: string): Promise<number> {
  const started = performance.now();
  const child = spawn('sh', ['-c', 'find . -type f -print0 | xargs -0 cat >/dev/null'], {
    cwd: directory,
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  const [code] = (await once(child, 'exit')) as [number | null];
  if (code !== 0) throw new Error(`reading ${directory} ended with ${code}`);
  return performance.now() - started;
}

class FuseProcess {
  readonly #child: ChildProcess;
  #id = 0;

  constructor(descriptor: number) {
    const program = fileURLToPath(new URL('../fuse-server-process.js', import.meta.url));
    this.#child = spawn(process.execPath, [program], {
      stdio: ['ignore', 'inherit', 'inherit', descriptor, 'ipc'],
    });
  }

  async send(command: ServerCommand): Promise<ServerAnswer> {
    const answer = once(this.#child, 'message') as Promise<[ServerAnswer]>;
    this.#child.send({ id: ++this.#id, command });
    const [{ error, ...rest }] = await answer;
    if (error !== undefined) throw new Error(error);
    return rest;
  }

  async end(): Promise<void> {
    const exit = once(this.#child, 'exit');
    this.#child.kill('SIGKILL');
    await exit;
  }
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((one, other) => one - other);
  const middle = sorted.length >> 1;
  const upper = sorted[middle] ?? NaN;
  return sorted.length % 2 === 1 ? upper : (upper + (sorted[middle - 1] ?? NaN)) / 2;
}

/** @param rounds of each way, interleaved, the first of them not counted */
export async function cachedRead(rounds = 5): Promise<CachedReadResult[]> {
  const work = mkdtempSync(path.join(tmpdir(), 'erofs-nbd-cached-read-'));
  const [source, mountPoint, erofs] = ['source', 'fuse', 'erofs'].map((name) => path.join(work, name)) as [
    string,
    string,
    string,
  ];
  for (const directory of [source, mountPoint, erofs]) mkdirSync(directory);
  const bytes = makeSource(source);
  const descriptor = openFuse();
  const server = new FuseProcess(descriptor);
  let layerId = 0;

  const throughLoop = async (image: string): Promise<number> => {
    const device = execFileSync('losetup', ['-f', '--show', '-r', image], { encoding: 'utf8' }).trim();
    try {
      mountSync(device, erofs, 'erofs', MS_RDONLY, '');
      try {
        return await readAll(erofs);
      } finally {
        unmountSync(erofs);
      }
    } finally {
      execFileSync('losetup', ['-d', device]);
    }
  };
  const throughFuse = async (image: string): Promise<number> => {
    layerId++;
    const { size } = statSync(image);
    const identifier = `erofs-nbd:${layerId}`;
    const { device } = await server.send({ do: 'attach', layerId, identifier, path: image, size, now: true });
    mountSync(device?.path ?? '', erofs, 'erofs', MS_RDONLY, '');
    try {
      return await readAll(erofs);
    } finally {
      unmountSync(erofs);
      await server.send({ do: 'detach', layerId });
    }
  };

  try {
    await server.send({ do: 'serve', mountPoint });
    await mountFuse(descriptor, mountPoint);
    const results: CachedReadResult[] = [];
    for (const image of ['uncompressed', 'lz4hc'] as const) {
      const file = path.join(work, image);
      const options = image === 'lz4hc' ? ['-zlz4hc'] : [];
      execFileSync('mkfs.erofs', ['--quiet', ...options, file, source], {
        stdio: ['ignore', 'ignore', 'pipe'],
      });
      const times = { loop: [] as number[], fuse: [] as number[] };
      for (let round = 0; round <= rounds; round++) {
        execFileSync('cat', [file], { stdio: 'ignore' });
        // Who goes first changes from round to round.
        for (const way of round % 2 === 0 ? (['loop', 'fuse'] as const) : (['fuse', 'loop'] as const)) {
          const ms = way === 'loop' ? await throughLoop(file) : await throughFuse(file);
          if (round > 0) times[way].push(ms);
        }
      }
      const [loopMs, fuseMs] = [Math.round(median(times.loop)), Math.round(median(times.fuse))];
      results.push({ image, bytes, loopMs, fuseMs, ratio: Number((loopMs / fuseMs).toFixed(2)), rounds });
    }
    await unmountFuse(mountPoint);
    return results;
  } finally {
    // Nothing can wait for the server any more once the connection is gone.
    await server.end();
    closeSync(descriptor);
    for (const place of [erofs, mountPoint]) {
      try {
        unmountSync(place);
      } catch {
        // Not mounted: all went well.
      }
    }
    rmSync(work, { recursive: true });
  }
}
