/**
 * How fast a layer whose bytes are all in the cache is read through EROFS on a device of ours, next to the same image
 * through a loop device: every file of it, one after the other, by cat(1). The bytes are in the page cache both times, and
 * what the kernel keeps above them is cold: a fresh mount on a fresh device in every round.
 *
 *     npm run bench -- cached-read [ROUNDS [MEGABYTES [WARM]]]        nbd where the kernel has it, FUSE otherwise
 *     npm run bench -- cached-read --vm [ROUNDS [MEGABYTES [WARM]]]   in the test machine, whose kernel has nbd
 *
 * WARM rounds go before those that count. A server that has run for a while is what users have; in the test machine, which
 * emulates every instruction, V8 takes some ten thousand requests to have compiled what serves them.
 *
 * The images are made of files of /usr/lib. Needs root, mkfs.erofs, losetup, and for FUSE Linux >= 6.12 with EROFS.
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
  readFileSync,
  rmSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { mountFuse, openFuse, probeFuse, unmountFuse } from '../../blobserve/attach/fuse-mount.js';
import { probeNbd } from '../../blobserve/attach/nbd-device.js';
import { MS_RDONLY, mountSync, unmountSync } from '../../blobserve/linux/mount.js';
import { median } from './median.js';
import type { LayerAnswer, LayerCommand } from './serve-layer.js';

const SOURCE = '/usr/lib';
/** Files of all places, not only of the first directories. */
const SOURCE_STRIDE = 11;
const LARGEST_FILE = 16e6;

/** What a device was asked for while all files were read, mounting included. */
interface Requests {
  readonly count: number;
  /** Mean size in bytes. */
  readonly bytes: number;
}

export interface CachedReadResult {
  readonly attach: 'nbd' | 'fuse';
  readonly image: 'uncompressed' | 'lz4hc';
  /** Bytes of the files. */
  readonly bytes: number;
  /** Medians, in milliseconds for all files. */
  readonly loopMs: number;
  readonly oursMs: number;
  /** Our speed in parts of that through the loop device. */
  readonly ratio: number;
  readonly loopRequests: Requests;
  readonly ourRequests: Requests;
  readonly rounds: number;
}

/** Copies files until there are enough of them. */
function makeSource(directory: string, wanted: number): number {
  let bytes = 0;
  let index = 0;
  const files = readdirSync(SOURCE, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => path.join(entry.parentPath, entry.name))
    .sort();
  for (let place = 0; place < files.length && bytes < wanted; place += SOURCE_STRIDE) {
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

/** Reads that a block device has completed so far, from <kernel>/Documentation/block/stat.rst. */
function completedReads(device: string): { count: number; bytes: number } {
  const [count = NaN, , sectors = NaN] = readFileSync(`/sys/block/${path.basename(device)}/stat`, 'utf8')
    .trim()
    .split(/\s+/)
    .map(Number);
  return { count, bytes: sectors * 512 };
}

/** The process of serve-layer.ts. */
class LayerProcess {
  readonly #child: ChildProcess;
  #id = 0;

  constructor(arguments_: string[], descriptor?: number) {
    const program = fileURLToPath(new URL('./serve-layer.js', import.meta.url));
    this.#child = spawn(process.execPath, [...profiling(), program, ...arguments_], {
      stdio: ['ignore', 'inherit', 'inherit', descriptor ?? 'ignore', 'ipc'],
    });
  }

  async send(command: LayerCommand): Promise<LayerAnswer> {
    const answer = once(this.#child, 'message') as Promise<[LayerAnswer]>;
    this.#child.send({ id: ++this.#id, command });
    const [{ error, ...rest }] = await answer;
    if (error !== undefined) throw new Error(error);
    return rest;
  }

  async end(): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    const exit = once(this.#child, 'exit');
    this.#child.disconnect();
    await exit;
  }
}

/** `BENCH_CPU_PROFILE=DIRECTORY` has the serving process write where its time goes. */
function profiling(): string[] {
  const directory = process.env['BENCH_CPU_PROFILE'];
  return directory === undefined ? [] : ['--cpu-prof', `--cpu-prof-dir=${directory}`];
}

interface Read {
  readonly ms: number;
  readonly requests: Requests;
  /** Of the serving process, which a loop device does not have; thousandths of a millisecond per request. */
  readonly cpu?: { readonly user: number; readonly system: number };
}

async function throughLoop(image: string, mountPoint: string): Promise<Read> {
  const device = execFileSync('losetup', ['-f', '--show', '-r', image], { encoding: 'utf8' }).trim();
  try {
    const before = completedReads(device);
    mountSync(device, mountPoint, 'erofs', MS_RDONLY, '');
    try {
      const ms = await readAll(mountPoint);
      const { count, bytes } = completedReads(device);
      return { ms, requests: mean(count - before.count, bytes - before.bytes) };
    } finally {
      unmountSync(mountPoint);
    }
  } finally {
    execFileSync('losetup', ['-d', device]);
  }
}

async function throughOurs(
  server: LayerProcess,
  layerId: number,
  image: string,
  mountPoint: string,
): Promise<Read> {
  const { path: device = '' } = await server.send({ do: 'attach', layerId, image });
  let ms = NaN;
  try {
    mountSync(device, mountPoint, 'erofs', MS_RDONLY, '');
    try {
      ms = await readAll(mountPoint);
    } finally {
      unmountSync(mountPoint);
    }
  } catch (error) {
    await server.send({ do: 'detach', layerId });
    throw error;
  }
  const { statistics, cpu } = await server.send({ do: 'detach', layerId });
  if (statistics === undefined || cpu === undefined) {
    throw new Error('the serving process tells nothing of its reads');
  }
  const { reads, readBytes } = statistics;
  const each = { user: Math.round(cpu.user / reads), system: Math.round(cpu.system / reads) };
  return { ms, requests: mean(reads, readBytes), cpu: each };
}

function mean(count: number, bytes: number): Requests {
  return { count, bytes: Math.round(bytes / count) };
}

/**
 * @param attach how our device reaches the kernel
 * @param rounds of each way, interleaved
 * @param megabytes of files
 * @param warm rounds before them, not counted: of both ways the first, of ours the others
 */
export async function cachedRead(
  attach: 'nbd' | 'fuse',
  rounds = 5,
  megabytes = 150,
  warm = 1,
): Promise<CachedReadResult[]> {
  const work = mkdtempSync(path.join(tmpdir(), 'erofs-nbd-cached-read-'));
  const [source, fuse, erofs, cache] = ['source', 'fuse', 'erofs', 'cache'].map((name) =>
    path.join(work, name),
  ) as [string, string, string, string];
  for (const directory of [source, fuse, erofs, cache]) mkdirSync(directory);
  const descriptor = attach === 'fuse' ? openFuse() : undefined;
  const server = new LayerProcess([attach, cache, fuse], descriptor);
  let layerId = 0;
  try {
    if (descriptor !== undefined) await mountFuse(descriptor, fuse);
    console.error(`copying ${megabytes} MB of ${SOURCE}`);
    const bytes = makeSource(source, megabytes * 1e6);
    const results: CachedReadResult[] = [];
    for (const image of ['uncompressed', 'lz4hc'] as const) {
      const file = path.join(work, image);
      const options = image === 'lz4hc' ? ['-zlz4hc'] : [];
      execFileSync('mkfs.erofs', ['--quiet', ...options, file, source], {
        stdio: ['ignore', 'ignore', 'pipe'],
      });
      const reads = { loop: [] as Read[], ours: [] as Read[] };
      for (let round = 1 - warm; round <= rounds; round++) {
        execFileSync('cat', [file], { stdio: 'ignore' });
        // Who goes first changes from round to round.
        const both = round % 2 === 0 ? (['loop', 'ours'] as const) : (['ours', 'loop'] as const);
        for (const way of round < 0 ? (['ours'] as const) : both) {
          const read =
            way === 'loop'
              ? await throughLoop(file, erofs)
              : await throughOurs(server, ++layerId, file, erofs);
          // In the test machine a round takes a while.
          const { cpu } = read;
          const used =
            cpu === undefined ? '' : `; each request ${cpu.user} µs in Node, ${cpu.system} in the kernel`;
          console.error(`${image}, round ${round}: ${way} ${Math.round(read.ms)} ms${used}`);
          if (round > 0) reads[way].push(read);
        }
      }
      const [loopMs, oursMs] = [reads.loop, reads.ours].map((all) => median(all.map(({ ms }) => ms))) as [
        number,
        number,
      ];
      results.push({
        attach,
        image,
        bytes,
        loopMs: Math.round(loopMs),
        oursMs: Math.round(oursMs),
        ratio: Number((loopMs / oursMs).toFixed(2)),
        loopRequests: reads.loop.at(-1)?.requests ?? mean(NaN, NaN),
        ourRequests: reads.ours.at(-1)?.requests ?? mean(NaN, NaN),
        rounds,
      });
    }
    return results;
  } finally {
    for (const place of [erofs, ...(descriptor === undefined ? [] : [fuse])]) {
      try {
        if (place === fuse) await unmountFuse(fuse);
        else unmountSync(place);
      } catch {
        // Not mounted: all went well.
      }
    }
    // Nothing can wait for the server any more once the connection is gone.
    await server.end();
    if (descriptor !== undefined) closeSync(descriptor);
    rmSync(work, { recursive: true });
  }
}

/** The backend that "auto" would take on this machine, or why there is none. */
export async function attachHere(): Promise<{ attach: 'nbd' | 'fuse' } | { reason: string }> {
  const nbd = await probeNbd();
  if (nbd.available) return { attach: 'nbd' };
  const fuse = await probeFuse();
  return fuse.available ? { attach: 'fuse' } : { reason: `${nbd.reason}; ${fuse.reason}` };
}

export function reportCachedRead(results: readonly CachedReadResult[]): void {
  const requests = ({ count, bytes }: Requests): string => `${count} x ${(bytes / 1024).toFixed(0)} KiB`;
  const [first] = results;
  console.log(`cached layer, ${((first?.bytes ?? NaN) / 1e6).toFixed(0)} MB of files, each read once`);
  console.log(
    `${''.padEnd(14)}${'loop ms'.padStart(9)}${`${first?.attach ?? ''} ms`.padStart(9)}${'ratio'.padStart(8)}` +
      `${'requests to loop'.padStart(20)}${'to us'.padStart(20)}`,
  );
  for (const { image, loopMs, oursMs, ratio, loopRequests, ourRequests } of results) {
    console.log(
      `${image.padEnd(14)}${String(loopMs).padStart(9)}${String(oursMs).padStart(9)}${ratio.toFixed(2).padStart(8)}` +
        `${requests(loopRequests).padStart(20)}${requests(ourRequests).padStart(20)}`,
    );
  }
}

/** Runs the same command in the test machine. */
async function inTestMachine(arguments_: string[]): Promise<void> {
  const checkout = fileURLToPath(new URL('../../..', import.meta.url));
  const child = spawn(
    'bash',
    [
      path.join(checkout, 'test/vm/run.sh'),
      'bash',
      path.join(checkout, 'test/vm/guest/bench.sh'),
      ...arguments_,
    ],
    {
      cwd: checkout,
      stdio: ['ignore', 'inherit', 'inherit'],
      env: {
        VM_TIMEOUT: '1800',
        VM_MEMORY: '3G',
        ...process.env,
        VM_MODULES: 'overlay erofs nbd loop ext4',
      },
    },
  );
  const [code] = (await once(child, 'exit')) as [number | null];
  process.exitCode = code ?? 1;
}

/** `npm run bench -- cached-read` */
export async function cachedReadBenchmark(arguments_: string[]): Promise<void> {
  const numbers = arguments_.filter((argument) => argument !== '--vm');
  if (numbers.length < arguments_.length) {
    const [rounds = '5', megabytes = '75', warm = '1'] = numbers;
    await inTestMachine(['cached-read', rounds, megabytes, warm]);
    return;
  }
  const [rounds = 5, megabytes = 150, warm = 1] = numbers.map(Number);
  const here = await attachHere();
  if ('reason' in here) throw new Error(`neither nbd nor fuse can be had: ${here.reason}`);
  const results = await cachedRead(here.attach, rounds, megabytes, warm);
  reportCachedRead(results);
  console.log(JSON.stringify({ results }));
}
