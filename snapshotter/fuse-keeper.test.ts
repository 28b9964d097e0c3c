import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync, readSync, rmSync, writeSync } from 'node:fs';
import { mkdtemp, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { execa } from 'execa';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { silentLogger } from '../daemon/log.js';
import { dropFuse, endKeeper, isKept, keepFuse, takeKeptFuse } from './fuse-keeper.js';
import { isRunning, readIdentity, writeIdentity } from './process-identity.js';

/** Taking a descriptor out of another process needs the right to trace it. */
describe.skipIf(process.getuid?.() !== 0)('the keeper', () => {
  let directory: string;
  let file: string;
  /** Of a pipe that both ends hold: what is kept is this very open file, not one like it. */
  let descriptor: number;

  beforeEach(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'fuse-keeper-'));
    file = path.join(directory, 'keeper.json');
    const fifo = path.join(directory, 'fifo');
    await execa('mkfifo', [fifo]);
    descriptor = openSync(fifo, 'r+');
    // From here on nobody can open it again.
    rmSync(fifo);
  });
  afterEach(async () => {
    await endKeeper(file);
    await rm(directory, { recursive: true, force: true });
  });

  it('holds a descriptor for whoever comes next, when its first owner is gone', async () => {
    await keepFuse(file, descriptor);
    writeSync(descriptor, 'bytes in the pipe');
    closeSync(descriptor);
    const taken = await takeKeptFuse(file, silentLogger);
    if (taken === undefined) throw new Error('nothing was kept');
    const bytes = Buffer.alloc(17);
    readSync(taken, bytes);
    expect(bytes.toString()).toBe('bytes in the pipe');
    dropFuse(taken);
    expect(await isKept(file)).toBe(true);
  });

  it('is one: the one before it is ended', async () => {
    await keepFuse(file, descriptor);
    const first = await readIdentity(file);
    await keepFuse(file, descriptor);
    closeSync(descriptor);
    const second = await readIdentity(file);
    expect(second?.pid).not.toBe(first?.pid);
    if (first === undefined) throw new Error('the first keeper was not written down');
    await expect.poll(() => isRunning(first)).toBe(false);
  });

  it('gives nothing when it is dead, was never there, or is another process', async () => {
    expect(await takeKeptFuse(file, silentLogger)).toBeUndefined();
    await keepFuse(file, descriptor);
    closeSync(descriptor);
    const keeper = await readIdentity(file);
    process.kill(keeper?.pid ?? 0, 'SIGKILL');
    await expect.poll(() => isKept(file)).toBe(false);
    expect(await takeKeptFuse(file, silentLogger)).toBeUndefined();
    await writeIdentity(file, { pid: process.pid, startTicks: 1 });
    expect(await takeKeptFuse(file, silentLogger)).toBeUndefined();
  });

  it('is ended and forgotten, and another process with its number is not', async () => {
    const stranger = spawn('sleep', ['600'], { stdio: 'ignore' });
    await once(stranger, 'spawn');
    await writeIdentity(file, { pid: stranger.pid ?? 0, startTicks: 1 });
    await endKeeper(file);
    expect(stranger.signalCode).toBeNull();
    await expect(stat(file)).rejects.toMatchObject({ code: 'ENOENT' });
    stranger.kill('SIGKILL');
    await once(stranger, 'exit');
    await keepFuse(file, descriptor);
    closeSync(descriptor);
    const keeper = await readIdentity(file);
    await endKeeper(file);
    await endKeeper(file);
    if (keeper === undefined) throw new Error('no keeper was written down');
    await expect.poll(() => isRunning(keeper)).toBe(false);
  });
});
