/**
 * `npm run test:vm -- power-cut [--cuts 20] [--seed N]`: the power of a machine is cut while its daemons write to the cache
 * and to SQLite, again and again on the same disk. After each cut every span marked as valid must be right, the database
 * whole, every snapshot there whose creation was answered, and the daemons start and serve (guest/power-cut.ts).
 *
 * A cut is SIGKILL for QEMU: what the machine's kernel had not written to its disk is lost.
 */
import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { SeededRandom } from '../../metadata/testing/seeded-random.js';
import { smallErofs, withIdentity } from '../image/small-erofs.js';
import { bootMachine, makeDisk } from './machine.js';

const { values } = parseArgs({
  options: { cuts: { type: 'string', default: '20' }, seed: { type: 'string' } },
});
const CUTS = Number(values.cuts);
const SEED = Number(values.seed ?? Date.now() % 1_000_000);

const MIB = 2 ** 20;
const LAYERS = 12;
const LAYER_SIZE = 8 * MIB;
/** Milliseconds of work, at most, before a cut. */
const LONGEST = 8_000;
/** Seconds that one boot may take, with the machine of others busy. */
const BOOT_TIMEOUT = 400;

interface Said {
  readonly event: 'verified' | 'started' | 'right' | 'working' | 'kept' | 'failed' | 'end';
  readonly number?: number;
  readonly ms?: number;
  readonly why?: string;
  readonly spans?: number;
  readonly rows?: Record<string, number>;
  readonly failures?: string[];
}

/** What one boot came to. */
interface Boot {
  spans?: number;
  rows?: Record<string, number>;
  startMs?: number;
  kept: number;
  readonly failures: string[];
}

function note(message: string): void {
  console.log(`${(performance.now() / 1000).toFixed(1).padStart(7)} s  ${message}`);
}

/** As an OCI layout has them, and what the readers have to know of their size. */
async function makeBlobs(directory: string): Promise<void> {
  const { image } = await smallErofs(directory, LAYER_SIZE);
  const blobs = path.join(directory, 'blobs');
  await mkdir(path.join(blobs, 'sha256'), { recursive: true });
  for (let number = 1; number <= LAYERS; number += 1) {
    const blob = withIdentity(image, number);
    await writeFile(path.join(blobs, 'sha256', createHash('sha256').update(blob).digest('hex')), blob);
  }
  await writeFile(
    path.join(blobs, 'geometry.json'),
    JSON.stringify({ blocks: Math.floor(image.length / 65_536) - 4 }),
  );
}

/** One that is free here is free in the machine, which has no others. */
async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** @param after milliseconds of work before the cut; undefined: none is made */
async function boot(
  directory: string,
  port: number,
  kept: number,
  after: number | undefined,
): Promise<{ boot: Boot; ended: number }> {
  const result: Boot = { kept, failures: [] };
  let works = (): void => undefined;
  const working = new Promise<void>((resolve) => (works = resolve));
  const machine = bootMachine({
    disk: path.join(directory, 'disk'),
    program: [
      ...['test/vm/guest/power-cut.js', path.join(directory, 'blobs'), String(port), String(kept)],
      ...(after === undefined ? ['check'] : []),
    ],
    timeout: BOOT_TIMEOUT,
    onLine: (line) => {
      if (!line.startsWith('{"event":')) return console.log(`           ${line}`);
      const said = JSON.parse(line) as Said;
      if (said.event === 'verified')
        Object.assign(result, { spans: said.spans, rows: said.rows }, { failures: said.failures });
      if (said.event === 'started') Object.assign(result, { startMs: said.ms });
      if (said.event === 'kept') result.kept = said.number ?? 0;
      if (said.event === 'failed') result.failures.push(said.why ?? '');
      if (said.event === 'working') works();
    },
  });
  let isOver = false;
  const ended = machine.ended.finally(() => (isOver = true));
  await Promise.race([working, ended]);
  if (after !== undefined && !isOver) {
    await delay(after);
    await machine.cut();
  }
  const status = await ended;
  if (status !== (after === undefined ? 0 : 137)) result.failures.push(`the machine ended with ${status}`);
  return { boot: result, ended: status };
}

async function main(): Promise<boolean> {
  if (!Number.isSafeInteger(CUTS) || CUTS < 1) throw new Error('--cuts: expected a number above 0');
  const random = new SeededRandom(SEED);
  note(`seed ${SEED}; ${CUTS} cuts`);
  const directory = await mkdtemp(path.join(process.env['TMPDIR'] ?? '/var/tmp', 'erofs-nbd-cut-'));
  const port = await freePort();
  const failures: string[] = [];
  const found: number[] = [];
  let [kept, done] = [0, 0];
  try {
    await makeBlobs(directory);
    await makeDisk(path.join(directory, 'disk'), 1024 * MIB);
    for (; done <= CUTS && failures.length === 0; done += 1) {
      const after = done === CUTS ? undefined : random.below(LONGEST);
      const { boot: result } = await boot(directory, port, kept, after);
      const said =
        result.spans === undefined
          ? ''
          : `${result.spans} spans valid and compared, rows ${JSON.stringify(result.rows)}, `;
      if (result.spans !== undefined) found.push(result.spans);
      failures.push(...result.failures.map((failure) => `boot ${done + 1}: ${failure}`));
      note(
        `boot ${done + 1}: ${said}socket after ${result.startMs} ms, ${result.kept - kept} snapshots answered for` +
          (after === undefined ? '' : `; cut after ${after} ms of work`),
      );
      kept = result.kept;
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
  for (const failure of failures) console.log(`FAILED  ${failure}`);
  const compared = found.reduce((sum, spans) => sum + spans, 0);
  // A cache that is always empty after a cut would prove nothing.
  if (failures.length === 0 && compared === 0) failures.push('no span was ever marked as valid');
  const ok = failures.length === 0;
  console.log(
    JSON.stringify({
      ok,
      cuts: Math.min(done, CUTS),
      spans_compared: compared,
      snapshots_answered_for: kept,
      passed: ok ? CUTS : Math.max(0, done - 1),
      failed: failures.length,
    }),
  );
  return ok;
}

process.exitCode = (await main()) ? 0 : 1;
