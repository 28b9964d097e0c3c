import { spawn } from 'node:child_process';
import { access, mkdtemp, readFile, rm, rmdir } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createLogger } from '../daemon/log.js';
import { joinControlGroup, outliveContainer } from './control-group.js';

/** Where control groups of version 2 are mounted; undefined when they are not, or not ours to make. */
async function cgroup2(): Promise<string | undefined> {
  if (process.getuid?.() !== 0) return undefined;
  for (const line of (await readFile('/proc/self/mountinfo', 'utf8')).split('\n')) {
    const [before = '', after = ''] = line.split(' - ');
    if (after.startsWith('cgroup2 ') && after.includes('rw')) return before.split(' ')[4];
  }
  return undefined;
}
const mounted = await cgroup2();

describe('a control group for what outlives a container', () => {
  let directory: string;
  beforeEach(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'control-group-'));
  });
  afterEach(() => rm(directory, { recursive: true }));

  it.skipIf(mounted === undefined)('is made, and the process is in it', async () => {
    const name = path.basename(directory);
    const group = path.join(mounted ?? '', name);
    const child = spawn('sleep', ['60'], { stdio: 'ignore' });
    const ended = new Promise((resolve) => child.once('exit', resolve));
    try {
      await joinControlGroup(group, child.pid ?? 0);
      expect(await readFile(`/proc/${child.pid}/cgroup`, 'utf8')).toContain(`0::/${name}\n`);
      // One that is there already is used.
      await joinControlGroup(group, child.pid ?? 0);
    } finally {
      child.kill('SIGKILL');
      await ended;
      await expect.poll(() => rmdir(group).then(() => 'gone', String)).toBe('gone');
    }
  });

  it('is none where no control groups are, and nothing is left there', async () => {
    const group = path.join(directory, 'group');
    await expect(joinControlGroup(group, process.pid)).rejects.toThrow(`${group} is no control group`);
    await expect(access(group)).rejects.toThrow('ENOENT');
  });

  it('is no condition: without it the process serves as long as its container', async () => {
    const said: unknown[] = [];
    const log = { ...createLogger('test', 'error'), error: (...text: unknown[]) => said.push(text) };
    await outliveContainer(path.join(directory, 'group'), process.pid, log as never);
    expect(said).toHaveLength(1);
    await outliveContainer('', process.pid, log as never);
    expect(said).toHaveLength(1);
  });
});
