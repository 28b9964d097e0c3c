import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { lockIndex } from './index-lock.js';

const directory = mkdtempSync(path.join(tmpdir(), 'index-lock-'));
afterAll(() => rmSync(directory, { recursive: true }));

describe('the lock of an index', () => {
  it('is had by one at a time, in whatever order they come and go, and leaves no file', async () => {
    const file = path.join(directory, 'sha256', 'abc.lock');
    let holders = 0;
    let most = 0;
    let waited = 0;
    const one = async (): Promise<void> => {
      const release = await lockIndex(file, () => (waited += 1));
      holders += 1;
      most = Math.max(most, holders);
      await new Promise(setImmediate);
      holders -= 1;
      await release();
    };
    await Promise.all([one(), one(), one(), one()]);
    expect(most).toBe(1);
    expect(waited).toBeGreaterThan(0);
    expect(existsSync(file)).toBe(false);
  });
});
