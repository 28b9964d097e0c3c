/**
 * One run of containerd's suite against one snapshotter, and its results.
 */
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { patience } from '../patience.js';

export type Outcome = 'pass' | 'fail' | 'skip';

export interface TestResult {
  readonly outcome: Outcome;
  readonly seconds: number;
  /** What it said, the last lines of it. */
  readonly output: readonly string[];
}

/** The snapshotter that is tested. */
export interface Candidate {
  readonly socket: string;
  /** Its root directory. */
  readonly root: string;
  /** How containerd would call it. */
  readonly plugin: string;
}

/** Lines of a failed test that are shown. */
const OUTPUT_MAX = 40;
/** Milliseconds; a run takes half a minute on a quiet machine. */
const TIMEOUT = patience(600_000);

/**
 * @param suite the compiled suite
 * @param scratch a directory for the suite's own files, on a file system that takes overlay mounts
 * @param tests names of those wanted (`Proxy/Basic`); all of them when left out
 * @returns results by name (`Proxy/Basic`, `Metadata/Basic`, …); those of a run that broke off hold a failure
 */
export async function runSuite(
  suite: string,
  candidate: Candidate,
  scratch: string,
  tests?: readonly string[],
): Promise<Map<string, TestResult>> {
  if (tests?.length === 0) return new Map();
  await mkdir(scratch, { recursive: true });
  const wanted = tests === undefined ? [] : [`-test.run=${patternOf(tests)}`];
  const { all, exitCode, timedOut } = await execa(
    suite,
    ['-test.v', '-test.parallel=1', `-test.timeout=${TIMEOUT - 60_000}ms`, ...wanted],
    {
      cwd: path.dirname(suite),
      env: {
        TMPDIR: scratch,
        CONFORMANCE_SOCKET: candidate.socket,
        CONFORMANCE_ROOT: candidate.root,
        CONFORMANCE_PLUGIN: candidate.plugin,
      },
      all: true,
      reject: false,
      stdin: 'ignore',
      timeout: TIMEOUT,
    },
  );
  const results = parseResults(all);
  const failed = [...results.values()].some(({ outcome }) => outcome === 'fail');
  if (exitCode !== 0 && !failed) {
    const how = timedOut ? 'it took too long' : `it ended with status ${exitCode}`;
    results.set('the whole run', {
      outcome: 'fail',
      seconds: 0,
      output: [how, ...all.split('\n').slice(-OUTPUT_MAX)],
    });
  }
  return results;
}

/** For Go, which takes a test apart at its slashes: these tests, and perhaps the same under another first name. */
function patternOf(tests: readonly string[]): string {
  const names = tests.map((name) => name.split('/'));
  const either = (part: 0 | 1): string => `^(${[...new Set(names.map((name) => name[part]))].join('|')})$`;
  return `${either(0).replace('^(', '^Test(')}/${either(1)}`;
}

/** Reads what `go test -v` prints. */
export function parseResults(text: string): Map<string, TestResult> {
  const said = new Map<string, string[]>();
  const results = new Map<string, TestResult>();
  let current: string[] = [];
  for (const line of text.split('\n')) {
    const turn = /^=== (?:RUN|CONT|PAUSE|NAME)\s+Test(\S+)$/.exec(line)?.[1];
    if (turn !== undefined) {
      current = said.get(turn) ?? [];
      said.set(turn, current);
      continue;
    }
    const [, word, name, seconds] = /^ *--- (PASS|FAIL|SKIP): Test(\S+) \(([\d.]+)s\)$/.exec(line) ?? [];
    if (word === undefined || name === undefined) {
      current.push(line);
      continue;
    }
    // Without a slash it is the sum of the others.
    if (!name.includes('/')) continue;
    const outcome = word === 'PASS' ? 'pass' : word === 'SKIP' ? 'skip' : 'fail';
    results.set(name, {
      outcome,
      seconds: Number(seconds),
      output: (said.get(name) ?? []).slice(-OUTPUT_MAX),
    });
  }
  return results;
}
