import { execFileSync } from 'node:child_process';
import { linkSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { diskUsage } from './disk-usage.js';

const directories: string[] = [];
afterEach(() => {
  for (const directory of directories.splice(0)) rmSync(directory, { recursive: true, force: true });
});

describe('disk usage', () => {
  it('is what du says: blocks, hard links once, links not followed, names that are not UTF-8', async () => {
    const directory = mkdtempSync(path.join(tmpdir(), 'erofs-nbd-usage-'));
    directories.push(directory);
    mkdirSync(path.join(directory, 'a/b'), { recursive: true });
    writeFileSync(path.join(directory, 'a/file'), Buffer.alloc(100_000, 1));
    linkSync(path.join(directory, 'a/file'), path.join(directory, 'a/b/link'));
    symlinkSync('/usr', path.join(directory, 'a/usr'));
    writeFileSync(
      Buffer.concat([Buffer.from(`${directory}/a/`), Buffer.from([0xff, 0xfe])]),
      Buffer.alloc(5000, 1),
    );
    execFileSync('sync', ['-f', directory]); // delayed allocation: blocks are counted once they are there
    const { size, inodes } = await diskUsage(directory);
    const du = Number(execFileSync('du', ['-s', '-B', '1', directory]).toString().split('\t')[0]);
    expect(size).toBe(du);
    expect(inodes).toBe(6);
  });

  it('of what is not there is nothing', async () => {
    expect(await diskUsage('/nonexistent/erofs-nbd')).toEqual({ size: 0, inodes: 0 });
  });
});
