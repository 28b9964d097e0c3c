/**
 * A vitest reporter for who reads the end of a log: every skipped test with its reason, every failed one with its error,
 * then the counts in words, then the same counts as one JSON object.
 */
import path from 'node:path';
import { stripVTControlCharacters } from 'node:util';
import type { Reporter, TestCase, TestModule, TestSuite } from 'vitest/node';

/** What a run came to. */
export interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

export default class CountingReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[], unhandled: readonly unknown[]): void {
    let passed = 0;
    const skipped: string[] = [];
    const failed = unhandled.map((error) => `outside of tests: ${messageOf(error)}`);
    for (const module of modules) {
      const file = path.relative(process.cwd(), module.moduleId);
      // A file that does not load, or a hook that fails, has no failing test to count.
      for (const error of module.errors()) failed.push(`${file}: ${messageOf(error)}`);
      for (const suite of module.children.allSuites())
        for (const error of suite.errors()) failed.push(`${file} > ${suite.fullName}: ${messageOf(error)}`);
      for (const test of module.children.allTests()) {
        const name = `${file} > ${test.fullName}`;
        const result = test.result();
        if (result.state === 'passed') passed++;
        else if (result.state === 'skipped') skipped.push(`${name}: ${result.note ?? modeOf(test)}`);
        // `pending` at the end of a run: it was begun and never finished.
        else failed.push(`${name}: ${result.errors?.map(messageOf).join('; ') ?? 'never finished'}`);
      }
    }
    const counts: Counts = { passed, failed: failed.length, skipped: skipped.length };
    const lines = [...section('Skipped:', skipped), ...section('Failed:', failed)];
    lines.push(
      '',
      `${passed} passed, ${failed.length} failed, ${skipped.length} skipped`,
      JSON.stringify(counts),
      '',
    );
    // At the very end: other reporters print their summaries after this call has returned.
    process.once('exit', () => process.stdout.write(lines.join('\n')));
  }
}

function section(title: string, lines: readonly string[]): string[] {
  return lines.length > 0 ? ['', title, ...lines.map((line) => `  ${line}`)] : [];
}

/** The first line of it, without colours: what there is to see it whole is further up in the log. */
function messageOf(error: unknown): string {
  const message = (error as { message?: unknown } | null)?.message ?? error;
  return stripVTControlCharacters(String(message)).split('\n', 1)[0]!.slice(0, 300);
}

/** For a test that never ran and so could not say why: by a mark of its own or of a suite around it. */
function modeOf(test: TestCase): string {
  let around: TestCase | TestSuite | TestModule = test;
  for (; around.type !== 'module'; around = around.parent) {
    if (around.type === 'suite' && around.errors().length > 0) return 'a hook of its suite failed';
  }
  return `marked ${test.options.mode}, no reason given`;
}
