import { describe, expect, it } from 'vitest';
import { parseResults } from './suite-run.js';

/** As `go test -v` prints tests that were paused and went on. */
const OUTPUT = `=== RUN   TestProxy
=== RUN   TestProxy/Basic
=== PAUSE TestProxy/Basic
=== RUN   TestProxy/Walk
=== PAUSE TestProxy/Walk
=== CONT  TestProxy/Basic
    helpers.go:1: unmount /x
=== CONT  TestProxy/Walk
    testsuite.go:2: --- PASS: TestProxy/Basic (9.00s)
    testsuite.go:3: wrong
--- FAIL: TestProxy (0.00s)
    --- PASS: TestProxy/Basic (0.37s)
    --- FAIL: TestProxy/Walk (1.04s)
    --- SKIP: TestProxy/Rename (0.00s)
FAIL
`;

describe('results of the suite', () => {
  it('are those of the subtests, each with what it said', () => {
    expect([...parseResults(OUTPUT)]).toEqual([
      ['Proxy/Basic', { outcome: 'pass', seconds: 0.37, output: ['    helpers.go:1: unmount /x'] }],
      [
        'Proxy/Walk',
        {
          outcome: 'fail',
          seconds: 1.04,
          output: ['    testsuite.go:2: --- PASS: TestProxy/Basic (9.00s)', '    testsuite.go:3: wrong'],
        },
      ],
      ['Proxy/Rename', { outcome: 'skip', seconds: 0, output: [] }],
    ]);
  });

  it('are none when the run broke off at once', () => {
    expect(parseResults('panic: no\n').size).toBe(0);
  });
});
