import { once } from 'node:events';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import type { ChildProcessWithoutNullStreams } from 'node:child_process';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { MetadataError } from './errors.js';
import { lockRoot, RootInUseError, type Owner, type RootLock } from './root-lock.js';
import { spawnTypescript } from './testing/spawn-typescript.js';

let root: string;
let children: ChildProcessWithoutNullStreams[];
let locks: RootLock[];

beforeEach(() => {
  root = mkdtempSync(path.join(tmpdir(), 'root-lock-'));
  children = [];
  locks = [];
});

afterEach(async () => {
  for (const lock of locks) lock.release();
  for (const child of children) {
    if (child.exitCode === null && child.signalCode === null) {
      child.kill('SIGKILL');
      await once(child, 'exit');
    }
  }
  rmSync(root, { recursive: true, force: true });
});

/** Starts a process that wants the root, and gives the first line it says about it. */
async function contender(address: string): Promise<{ child: ChildProcessWithoutNullStreams; said: string }> {
  const child = spawnTypescript('./lock-child.ts', [root, address]);
  children.push(child);
  let errors = '';
  child.stderr.setEncoding('utf8').on('data', (text: string) => (errors += text));
  for await (const line of createInterface({ input: child.stdout })) return { child, said: line };
  throw new Error(`lock-child said nothing: ${errors}`);
}

function lock(options: Partial<Parameters<typeof lockRoot>[1]> = {}): RootLock {
  const taken = lockRoot(root, { address: '/run/here.sock', version: '1', patienceMs: 0, ...options });
  locks.push(taken);
  return taken;
}

function refusal(action: () => unknown): MetadataError {
  try {
    action();
  } catch (error) {
    if (error instanceof MetadataError) return error;
    throw error;
  }
  throw new Error('nothing was refused');
}

describe('a root directory', () => {
  it('belongs to the first of two processes, and the second learns which that is', async () => {
    const first = await contender('/run/first.sock');
    expect(first.said).toBe('locked');
    const second = await contender('/run/second.sock');
    const { message, owner } = JSON.parse(second.said) as { message: string; owner: Owner };
    expect(owner).toMatchObject({ address: '/run/first.sock', version: '1.2.3' });
    // vite-node may run the program in a process below the one started.
    expect(message).toContain(`process id ${owner.pid}`);
    expect(owner.pid).toBe(first.child.pid);
    expect(message).toContain('/run/first.sock');
    expect(message).toContain(root);
  });

  it('is free again when its process is killed with SIGKILL', async () => {
    const { child, said } = await contender('/run/first.sock');
    expect(said).toBe('locked');
    expect(refusal(() => lock())).toBeInstanceOf(RootInUseError);
    child.kill('SIGKILL');
    await once(child, 'exit');
    lock();
    const owner = JSON.parse(readFileSync(path.join(root, 'owner.json'), 'utf8')) as Owner;
    expect(owner).toMatchObject({ pid: process.pid, address: '/run/here.sock', version: '1' });
    expect(Math.abs(Date.parse(owner.startedAt) - Date.now())).toBeLessThan(60_000);
  });

  it('can be had without waiting for the killed process to be gone', async () => {
    const { child } = await contender('/run/first.sock');
    child.kill('SIGKILL');
    lock({ patienceMs: 20_000 });
  });

  it('is free again after release, which leaves no owner behind', () => {
    const first = lock();
    expect(refusal(() => lock())).toBeInstanceOf(RootInUseError);
    first.release();
    first.release();
    expect(existsSync(path.join(root, 'owner.json'))).toBe(false);
    lock();
  });

  it.each([
    ['missing', undefined],
    ['cut off', '{"pid": 1'],
    ['not ours', '[1, 2]'],
    [
      'of a dead process',
      JSON.stringify({ pid: 2 ** 22 + 1, address: '/old.sock', version: '1', startedAt: 'x' }),
    ],
  ])('is refused without naming anybody when owner.json is %s', (_, content) => {
    lock();
    const file = path.join(root, 'owner.json');
    if (content === undefined) rmSync(file);
    else writeFileSync(file, content);
    const error = refusal(() => lock());
    expect(error).toBeInstanceOf(RootInUseError);
    expect((error as RootInUseError).owner).toBeUndefined();
    expect(error.message).toContain(`fuser ${path.join(root, 'lock.db')}`);
    expect(error.message).not.toContain('/old.sock');
  });

  it('is refused when something else lies where the lock file belongs', () => {
    const file = path.join(root, 'lock.db');
    const content = 'a letter to my aunt\n'.repeat(100);
    writeFileSync(file, content);
    const error = refusal(() => lock());
    expect(error.code).toBe('failed_precondition');
    expect(error.message).toContain(file);
    expect(readFileSync(file, 'utf8')).toBe(content);
  });

  it('is refused when it cannot be a directory', () => {
    const file = path.join(root, 'file');
    writeFileSync(file, '');
    const error = refusal(() => lockRoot(path.join(file, 'root'), { address: '', version: '' }));
    expect(error).toMatchObject({ code: 'unavailable' });
    expect(error.message).toContain('ENOTDIR');
  });
});
