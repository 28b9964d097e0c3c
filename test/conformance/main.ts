/**
 * `npm run conformance`: containerd's own test suite for snapshotters, and calls that must be refused, against our
 * snapshotter and against containerd's overlayfs. Whatever overlayfs passes, ours has to pass. Ends with one line of JSON.
 *
 *   --short  the suite alone, and of overlayfs only those tests that ours does not pass: the others cannot tell anything
 */
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { removeAbandonedStacks } from '../stack/abandoned.js';
import { startDaemon } from '../stack/daemon-process.js';
import { grpcAnswers } from '../stack/socket.js';
import { Stack } from '../stack/stack.js';
import { backendOf, expectedBackend } from '../system/requirements.js';
import { compareRefusals, type RefusalResult } from './error-codes.js';
import { buildGoPrograms } from './go-programs.js';
import { compareOddKeys } from './odd-keys.js';
import { runSuite, type Candidate, type TestResult } from './suite-run.js';

/** Of the name of the private directory. */
const PREFIX = 'erofs-nbd-conf';

type Results = ReadonlyMap<string, TestResult>;

function cell(result: TestResult | undefined): string {
  if (result === undefined) return isShort ? 'not asked' : 'missing';
  return result.outcome === 'skip' ? 'left out' : `${result.outcome} ${result.seconds.toFixed(2)} s`;
}

/** Prints both lists side by side. @returns names of the tests that ours fails, or that overlayfs alone passes */
function printSuite(ours: Results, overlayfs: Results): string[] {
  const names = [...new Set([...overlayfs.keys(), ...ours.keys()])].sort();
  const width = Math.max(...names.map((name) => name.length));
  const failed: string[] = [];
  console.log(`\n${'test'.padEnd(width)}  ${'ours'.padEnd(14)}overlayfs`);
  for (const name of names) {
    const [mine, theirs] = [ours.get(name), overlayfs.get(name)];
    const isWorse = mine?.outcome === 'fail' || (theirs?.outcome === 'pass' && mine?.outcome !== 'pass');
    if (isWorse) failed.push(name);
    console.log(
      `${name.padEnd(width)}  ${cell(mine).padEnd(14)}${cell(theirs)}${isWorse ? '   <-- FAILED' : ''}`,
    );
  }
  for (const name of failed) {
    console.log(`\n--- ${name}`);
    for (const line of ours.get(name)?.output ?? []) console.log(line);
  }
  return failed;
}

function printRefusals(results: readonly RefusalResult[]): void {
  const width = Math.max(...results.map(({ name }) => name.length));
  console.log(`\n${'calls with wrong or odd arguments'.padEnd(width)}  ${'ours'.padEnd(21)}overlayfs`);
  for (const { name, ours, overlayfs, trouble, why } of results) {
    const note = trouble !== undefined ? `   <-- FAILED: ${trouble}` : why !== undefined ? `   (${why})` : '';
    console.log(`${name.padEnd(width)}  ${ours.padEnd(21)}${overlayfs}${note}`);
  }
}

function count(results: Results, outcome: TestResult['outcome']): number {
  return [...results.values()].filter((result) => result.outcome === outcome).length;
}

const isShort = process.argv.includes('--short');
if (process.getuid?.() !== 0) throw new Error('conformance needs root: it mounts');
const programs = await buildGoPrograms();
await removeAbandonedStacks(PREFIX);
const stack = await Stack.create(PREFIX);
const troubles: string[] = [];
let report: Record<string, number | boolean | string> = {
  ok: false,
  passed: 0,
  failed: 1,
  reference_passed: 0,
};
try {
  const snapshotter = await stack.startSnapshotter();
  const ours: Candidate = {
    socket: snapshotter.plugin.address,
    root: snapshotter.plugin.root,
    plugin: snapshotter.plugin.name,
  };
  const reference: Candidate = {
    socket: path.join(stack.directory, 'overlayfs.sock'),
    root: path.join(stack.directory, 'overlayfs'),
    plugin: 'overlayfs',
  };
  await mkdir(reference.root);
  const daemon = await startDaemon({
    name: 'overlayfs',
    command: programs.overlayfs,
    parameters: [reference.socket, reference.root],
    log: path.join(stack.directory, 'overlayfs.log'),
    ready: () => grpcAnswers(reference.socket),
  });
  try {
    // One after the other, so that neither waits for what the other does to the disk.
    const run = async (candidate: Candidate, tests?: readonly string[]): Promise<Results> => {
      const startedAt = performance.now();
      const found = await runSuite(programs.suite, candidate, path.join(stack.directory, 'tmp'), tests);
      const seconds = ((performance.now() - startedAt) / 1000).toFixed(0);
      console.log(`the suite on ${candidate.plugin}: ${found.size} tests in ${seconds} s`);
      return found;
    };
    const results = await run(ours);
    // A failure of the whole run has a name without a slash, and no other snapshotter has that test.
    const doubtful = [...results].flatMap(([name, { outcome }]) =>
      outcome !== 'pass' && name.includes('/') ? [name] : [],
    );
    // After a test that uses it: overlayfs cannot list what a store holds that never held anything.
    const asked = isShort ? ['Proxy/Basic', 'Metadata/Basic', ...doubtful] : undefined;
    const referenceResults = await run(reference, asked);
    console.log(`containerd ${programs.containerdVersion}: snapshots/testsuite, over its client for proxy`);
    console.log('plugins (Proxy) and below its metadata store and garbage collector (Metadata)');
    const failed = printSuite(results, referenceResults);
    const skipped = count(results, 'skip');
    if (skipped > 0) {
      console.log(
        '\nLeft out by the suite itself, for every snapshotter: renaming a directory of a lower layer,',
      );
      console.log('which overlay mounts refuse with EXDEV unless redirect_dir is on.');
    }

    const sockets = { ours: ours.socket, overlayfs: reference.socket };
    const refusals = isShort ? [] : [...(await compareRefusals(sockets)), ...(await compareOddKeys(sockets))];
    if (refusals.length > 0) printRefusals(refusals);
    const wrongCodes = refusals.filter(({ trouble }) => trouble !== undefined).length;

    const passed = count(results, 'pass');
    const referencePassed = count(referenceResults, 'pass');
    const attach = (await backendOf(snapshotter)) ?? 'none';
    const expected = await expectedBackend();
    if (attach !== expected) troubles.push(`layers are attached with ${attach}, not with ${expected}`);
    report = {
      ok: failed.length + wrongCodes === 0 && passed > 0 && (isShort || referencePassed > 0),
      passed,
      failed: failed.length + wrongCodes,
      skipped,
      ...(isShort
        ? { reference_asked: referenceResults.size }
        : {
            reference_passed: referencePassed,
            reference_failed: count(referenceResults, 'fail'),
            error_codes: refusals.length,
            error_codes_wrong: wrongCodes,
          }),
      containerd: programs.containerdVersion,
      attach,
    };
  } finally {
    await daemon.stop();
  }
} catch (error) {
  troubles.push(error instanceof Error ? (error.stack ?? error.message) : String(error));
} finally {
  troubles.push(...(await stack.remove()));
}
for (const trouble of troubles) console.log(`\nnot as it should be: ${trouble}`);
if (troubles.length > 0) report = { ...report, ok: false };
console.log(`\n${JSON.stringify(report)}`);
process.exitCode = report['ok'] === true ? 0 : 1;
