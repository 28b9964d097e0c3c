/**
 * How fast our NBD server answers, next to nbdkit's file plugin: the same client (fio), the same file in the page
 * cache, one after the other in every round, so that what else the machine does hits both. Medians of the rounds.
 *
 *     npm run bench -- serve [ROUNDS [FILE_MIB]]
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomFillSync } from 'node:crypto';
import { once } from 'node:events';
import { closeSync, existsSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { execa } from 'execa';
import { z } from 'zod';
import { attachHere, cachedRead, type CachedReadResult, reportCachedRead } from './cached-read.js';
import { median } from './median.js';

const KIB = 1024;
const READ_BYTES = [4 * KIB, 128 * KIB, 1024 * KIB];
const DEPTHS = [1, 16];
const SECONDS_PER_RUN = 1;

const FioReport = z.object({
  jobs: z.tuple([z.object({ error: z.number(), read: z.object({ bw_bytes: z.number() }) })]),
});

interface Row {
  read_bytes: number;
  depth: number;
  ours_mbps: number;
  nbdkit_mbps: number;
  ratio: number;
}

function makeFile(path: string, mebibytes: number): void {
  const descriptor = openSync(path, 'w');
  const block = Buffer.alloc(1024 * KIB);
  for (let index = 0; index < mebibytes; index++) {
    randomFillSync(block);
    writeSync(descriptor, block);
  }
  closeSync(descriptor);
}

async function start(command: string, arguments_: string[], socket: string): Promise<ChildProcess> {
  const child = spawn(command, arguments_, { stdio: ['ignore', 'ignore', 'inherit'] });
  child.on('error', (error) => {
    throw new Error(`${command} cannot be started; the benchmark needs nbdkit and fio`, { cause: error });
  });
  for (let tries = 0; !existsSync(socket); tries++) {
    if (tries > 500 || child.exitCode !== null) {
      throw new Error(`${command} did not open ${socket}`);
    }
    await sleep(20);
  }
  return child;
}

async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode === null && child.signalCode === null) {
    const exit = once(child, 'exit');
    child.kill();
    await exit;
  }
}

/** MB/s (10^6 bytes) of random reads. */
async function measure(socket: string, fileBytes: number, readBytes: number, depth: number): Promise<number> {
  const { stdout } = await execa('fio', [
    '--name=serve',
    '--ioengine=nbd',
    `--uri=nbd+unix:///?socket=${socket}`,
    '--rw=randread',
    `--bs=${readBytes}`,
    `--iodepth=${depth}`,
    `--size=${fileBytes}`,
    '--time_based',
    `--runtime=${SECONDS_PER_RUN}`,
    '--output-format=json',
  ]);
  const [job] = FioReport.parse(JSON.parse(stdout.slice(stdout.indexOf('{')))).jobs;
  if (job.error !== 0) {
    throw new Error(`fio failed on ${socket}: error ${job.error}`);
  }
  return job.read.bw_bytes / 1e6;
}

export async function serve(arguments_: string[]): Promise<void> {
  const [rounds = 5, mebibytes = 512] = arguments_.map(Number);
  const directory = mkdtempSync(join(tmpdir(), 'erofs-nbd-bench-'));
  let rows: Row[] = [];
  const children: ChildProcess[] = [];
  try {
    const file = join(directory, 'blob');
    makeFile(file, mebibytes);
    const ours = join(directory, 'ours.sock');
    const nbdkit = join(directory, 'nbdkit.sock');
    children.push(
      await start(
        process.execPath,
        [fileURLToPath(new URL('./serve-file.js', import.meta.url)), ours, file],
        ours,
      ),
      await start('nbdkit', ['-f', '-r', '-U', nbdkit, 'file', file], nbdkit),
    );
    const cells = DEPTHS.flatMap((depth) => READ_BYTES.map((readBytes) => ({ readBytes, depth })));
    const measured = cells.map(() => ({ ours: [] as number[], nbdkit: [] as number[] }));
    const fileBytes = mebibytes * 1024 * KIB;
    for (let round = 0; round < rounds; round++) {
      for (const [index, { readBytes, depth }] of cells.entries()) {
        // Who goes first changes from round to round.
        for (const who of round % 2 === 0 ? (['ours', 'nbdkit'] as const) : (['nbdkit', 'ours'] as const)) {
          const speed = await measure(who === 'ours' ? ours : nbdkit, fileBytes, readBytes, depth);
          measured[index]?.[who].push(speed);
        }
      }
    }
    rows = cells.map(({ readBytes, depth }, index) => {
      const oursMbps = median(measured[index]?.ours ?? []);
      const nbdkitMbps = median(measured[index]?.nbdkit ?? []);
      return {
        read_bytes: readBytes,
        depth,
        ours_mbps: Math.round(oursMbps),
        nbdkit_mbps: Math.round(nbdkitMbps),
        ratio: Number((oursMbps / nbdkitMbps).toFixed(2)),
      };
    });
  } finally {
    await Promise.all(children.map(stop));
    rmSync(directory, { recursive: true });
  }
  const here = await attachHere();
  report(rows, 'attach' in here ? await cachedRead(here.attach, rounds) : here.reason);
}

function report(rows: Row[], cached: readonly CachedReadResult[] | string): void {
  console.log('reads of    depth     ours   nbdkit    ratio');
  for (const row of rows) {
    console.log(
      `${`${row.read_bytes / KIB} KiB`.padEnd(12)}${String(row.depth).padStart(5)}` +
        `${String(row.ours_mbps).padStart(9)}${String(row.nbdkit_mbps).padStart(9)}${row.ratio.toFixed(2).padStart(9)}`,
    );
  }
  console.log('MB/s of random reads, file in the page cache');
  if (typeof cached === 'string') {
    console.log(`cached read through EROFS: not measured: ${cached}`);
  } else {
    console.log();
    reportCachedRead(cached);
  }
  const worst = typeof cached === 'string' ? null : Math.min(...cached.map(({ ratio }) => ratio));
  console.log(JSON.stringify({ rows, cached_read_ratio: worst }));
}
