import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  isRunning,
  processIdentity,
  readIdentity,
  signalProcess,
  waitForEnd,
  writeIdentity,
} from './process-identity.js';

describe('the identity of a process', () => {
  let directory: string;
  beforeEach(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'process-identity-'));
  });
  afterEach(() => rm(directory, { recursive: true, force: true }));

  it('is the same as long as the process runs, and nobody else’s', async () => {
    const own = await processIdentity(process.pid);
    expect(own?.pid).toBe(process.pid);
    expect(await processIdentity(process.pid)).toEqual(own);
    expect(own !== undefined && (await isRunning(own))).toBe(true);
    // A process that got the number later started later.
    expect(await isRunning({ pid: process.pid, startTicks: (own?.startTicks ?? 0) - 1 })).toBe(false);
  });

  it('is none once the process has ended, waited for or not', async () => {
    const child = spawn('sleep', ['600'], { stdio: 'ignore' });
    await once(child, 'spawn');
    const identity = await processIdentity(child.pid ?? 0);
    if (identity === undefined) throw new Error('the child is not there');
    expect(await waitForEnd(identity, 30)).toBe(false);
    await signalProcess(identity, 'SIGKILL');
    expect(await waitForEnd(identity, 10_000)).toBe(true);
    await signalProcess(identity, 'SIGKILL');
    expect(await processIdentity(identity.pid)).toBeUndefined();
  });

  it('spares a process that merely has the number', async () => {
    const child = spawn('sleep', ['600'], { stdio: 'ignore' });
    await once(child, 'spawn');
    await signalProcess({ pid: child.pid ?? 0, startTicks: 1 }, 'SIGKILL');
    expect(child.exitCode ?? child.signalCode).toBeNull();
    expect(await processIdentity(child.pid ?? 0)).toBeDefined();
    child.kill('SIGKILL');
    await once(child, 'exit');
  });

  it('is read as it was written', async () => {
    const file = path.join(directory, 'record.json');
    expect(await readIdentity(file)).toBeUndefined();
    await writeIdentity(file, { pid: 42, startTicks: 4711 });
    expect(await readIdentity(file)).toEqual({ pid: 42, startTicks: 4711 });
  });

  it.each([
    '',
    'null',
    '{',
    '[]',
    '{"pid":1,"startTicks":2}',
    '{"pid":-1,"startTicks":2}',
    '{"pid":"9","startTicks":2}',
    '{"pid":9}',
  ])('is none in a file that holds %j', async (text) => {
    const file = path.join(directory, 'record.json');
    await writeFile(file, text);
    expect(await readIdentity(file)).toBeUndefined();
  });
});
