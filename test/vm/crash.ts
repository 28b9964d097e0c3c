/**
 * `npm run test:vm -- crash --full`: what `npm run test:crash` does, at every fault point of nbd and at 200 random moments, in
 * several boots of the test machine, since every instruction is emulated; and the sum of them.
 *
 *   --boots N        in how many boots, default 8
 *   --results DIR    keeps what each boot came to; boots that are there already are not made again
 *   --at-most N      makes no more than so many boots now; the sum is of those that are there
 *   --seed N, --kills N, --burst N, --points LIST, --readers N, --files N   as of test:crash
 *
 * The last line is one JSON object; the status is 0 when all boots are there and nothing failed in any.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { type KindOutcome, median, printTable, type Summary } from '../crash/report.js';
import { checkout } from '../debian/packages.js';

const { values } = parseArgs({
  options: {
    full: { type: 'boolean' },
    boots: { type: 'string', default: '8' },
    results: { type: 'string' },
    'at-most': { type: 'string' },
    seed: { type: 'string' },
    kills: { type: 'string', default: '200' },
    burst: { type: 'string', default: '3' },
    points: { type: 'string', default: 'all' },
    readers: { type: 'string', default: '1' },
    files: { type: 'string' },
  },
});
const BOOTS = Number(values.boots);
const AT_MOST = Number(values['at-most'] ?? BOOTS);
for (const [name, number] of Object.entries({ boots: BOOTS, 'at-most': AT_MOST }))
  if (!Number.isSafeInteger(number) || number < 0) throw new Error(`--${name}: expected a whole number`);

/** What the boots of one run have in common: those of another are not added to it. */
interface Run {
  readonly boots: number;
  readonly seed: string;
  readonly parameters: readonly string[];
}

interface Boot {
  readonly part: number;
  /** The machine's. */
  readonly status: number;
  /** Undefined when it died before its end. */
  readonly summary?: Summary;
}

async function readJson<T>(file: string): Promise<T | undefined> {
  const text = await readFile(file, 'utf8').catch(() => undefined);
  return text === undefined ? undefined : (JSON.parse(text) as T);
}

/** The run of a directory, which is begun when there is none. @throws when it is one of other parameters */
async function openRun(directory: string): Promise<Run> {
  const parameters = [
    ...['--kills', values.kills, '--burst', values.burst, '--points', values.points],
    ...['--readers', values.readers, ...(values.files === undefined ? [] : ['--files', values.files])],
  ];
  const file = path.join(directory, 'run.json');
  const before = await readJson<Run>(file);
  const run = {
    boots: BOOTS,
    seed: values.seed ?? before?.seed ?? String(Date.now() % 1_000_000),
    parameters,
  };
  if (before !== undefined && JSON.stringify(before) !== JSON.stringify(run))
    throw new Error(`--results: ${directory} has boots of another run: ${JSON.stringify(before)}`);
  await writeFile(file, `${JSON.stringify(run)}\n`);
  return run;
}

async function boot(part: number, { boots, seed, parameters }: Run): Promise<Boot> {
  const own = ['--part', `${part}/${boots}`, '--seed', seed, ...parameters];
  const child = spawn(path.join(checkout, 'test/vm/run.sh'), ['bash', 'test/vm/guest/crash.sh', ...own], {
    cwd: checkout,
    stdio: ['ignore', 'pipe', 'inherit'],
    env: { ...process.env, VM_MODULES: 'overlay erofs nbd loop ext4' },
  });
  const ended = once(child, 'close') as Promise<[number | null]>;
  let last = '';
  for await (const line of createInterface(child.stdout)) {
    console.log(line);
    last = line;
  }
  const [code] = await ended;
  const status = code ?? 125;
  return { part, status, ...(last.startsWith('{"ok":') && { summary: JSON.parse(last) as Summary }) };
}

function addUp(done: readonly Boot[]): boolean {
  const kinds: Record<string, KindOutcome> = {};
  const summaries = done.flatMap(({ summary }) => summary ?? []);
  for (const summary of summaries) {
    for (const [kind, { failed, stalls }] of Object.entries(summary.kinds)) {
      const all = (kinds[kind] ??= { failed: 0, stalls: [] });
      all.stalls.push(...stalls);
      all.failed += failed;
    }
  }
  const sum = (number: (summary: Summary) => number): number =>
    summaries.reduce((total, summary) => total + number(summary), 0);
  const [errors, wrong] = [sum((one) => one.errors), sum((one) => one.wrong_bytes)];
  const [files, bytes] = [sum((one) => one.files_read), sum((one) => one.bytes_read)];
  console.log(`== ${done.length} of ${BOOTS} boots`);
  printTable(kinds, { files, bytes, errors, wrong });
  const died = done.filter(({ summary }) => summary === undefined);
  for (const { part, status } of died)
    console.log(`FAILED  boot ${part} ended with status ${status} before its end`);
  for (const { part, status, summary } of done)
    if (summary !== undefined && status !== 0)
      console.log(`FAILED  boot ${part}: ${summary.failed} failures`);
  const failed = sum((one) => one.failed) + died.length;
  const ok = failed === 0 && done.length === BOOTS && done.every(({ status }) => status === 0);
  const stalls = Object.values(kinds).flatMap((one) => one.stalls);
  console.log(
    JSON.stringify({
      ...{ ok, attach: 'nbd', boots: done.length, kills: stalls.length, errors, wrong_bytes: wrong },
      leaks: sum((one) => one.leaks),
      longest_stall_ms: Math.max(0, ...stalls),
      median_stall_ms: median(stalls),
      node_start_ms: median(summaries.map((one) => one.node_start_ms)),
      ...{ files_read: files, passed: sum((one) => one.passed), failed },
    }),
  );
  return ok;
}

async function main(): Promise<boolean> {
  const directory =
    values.results ?? (await mkdtemp(path.join(process.env['TMPDIR'] ?? '/var/tmp', 'erofs-nbd-kills-')));
  try {
    await mkdir(directory, { recursive: true });
    const run = await openRun(directory);
    const done: Boot[] = [];
    let made = 0;
    for (let part = 1; part <= BOOTS; part += 1) {
      const file = path.join(directory, `boot-${part}.json`);
      let one = await readJson<Boot>(file);
      if (one === undefined && made < AT_MOST) {
        console.log(`== boot ${part} of ${BOOTS}`);
        one = await boot(part, run);
        made += 1;
        await writeFile(file, `${JSON.stringify(one)}\n`);
      }
      if (one !== undefined) done.push(one);
    }
    return addUp(done);
  } finally {
    if (values.results === undefined) await rm(directory, { recursive: true, force: true });
  }
}

process.exitCode = (await main()) ? 0 : 1;
