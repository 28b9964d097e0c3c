/**
 * A vitest reporter for who reads the end of a log: every skipped test with its reason, then the counts in words, then
 * the same counts as one JSON object.
 */
import path from 'node:path';
import type { Reporter, TestCase, TestModule, TestSuite } from 'vitest/node';

/** What a run came to. */
export interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

export default class CountingReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[], unhandled: readonly unknown[]): void {
    const counts: Counts = { passed: 0, failed: unhandled.length, skipped: 0 };
    const skipped: string[] = [];
    for (const module of modules) {
      // A file that does not load, or a hook that fails, has no failing test to count.
      counts.failed += module.errors().length;
      for (const suite of module.children.allSuites()) counts.failed += suite.errors().length;
      for (const test of module.children.allTests()) count(test, module, counts, skipped);
    }
    const lines = skipped.length > 0 ? ['', 'Skipped:', ...skipped.map((line) => `  ${line}`)] : [];
    const { passed, failed } = counts;
    lines.push(
      '',
      `${passed} passed, ${failed} failed, ${counts.skipped} skipped`,
      JSON.stringify(counts),
      '',
    );
    // At the very end: other reporters print their summaries after this call has returned.
    process.once('exit', () => process.stdout.write(lines.join('\n')));
  }
}

function count(test: TestCase, module: TestModule, counts: Counts, skipped: string[]): void {
  const result = test.result();
  if (result.state === 'passed') counts.passed++;
  else if (result.state === 'skipped') {
    counts.skipped++;
    const why = result.note ?? modeOf(test);
    skipped.push(`${path.relative(process.cwd(), module.moduleId)} > ${test.fullName}: ${why}`);
  } else {
    // `pending` at the end of a run: it was begun and never finished.
    counts.failed++;
  }
}

/** For a test that never ran and so could not say why: by a mark of its own or of a suite around it. */
function modeOf(test: TestCase): string {
  let around: TestCase | TestSuite | TestModule = test;
  for (; around.type !== 'module'; around = around.parent) {
    if (around.type === 'suite' && around.errors().length > 0) return 'a hook of its suite failed';
  }
  return `marked ${test.options.mode}, no reason given`;
}
