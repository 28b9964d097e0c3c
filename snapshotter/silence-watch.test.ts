import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { SilenceWatch } from './silence-watch.js';

/** Answers each line with a line, from an event loop that can be stopped. */
const PROGRAM = "process.stdin.on('data', (data) => process.stdout.write(data))";

const children: ChildProcess[] = [];
const watches: SilenceWatch[] = [];
afterEach(() => {
  for (const watch of watches.splice(0)) watch.stop();
  for (const child of children.splice(0)) child.kill('SIGKILL');
});

async function answering(): Promise<{ child: ChildProcess; ask: (timeoutMs: number) => Promise<boolean> }> {
  const child = spawn(process.execPath, ['-e', PROGRAM], { stdio: ['pipe', 'pipe', 'inherit'] });
  children.push(child);
  const ask = async (timeoutMs: number): Promise<boolean> => {
    child.stdin?.write('?');
    const answer = child.stdout === null ? undefined : once(child.stdout, 'data').then(() => true);
    return (await Promise.race([answer, delay(timeoutMs).then(() => false)])) ?? false;
  };
  while (!(await ask(5000)));
  return { child, ask };
}

function watch(
  pid: number,
  ask: (timeoutMs: number) => Promise<boolean>,
  silenceMs: number,
): Promise<number> {
  return new Promise((resolve) => {
    watches.push(new SilenceWatch({ pid, ask, silenceMs, onSilent: resolve }));
  });
}

describe('a watch for silence', () => {
  it('tells of a process whose event loop hangs, after the time that is too long', async () => {
    const { child, ask } = await answering();
    const start = performance.now();
    const silent = watch(child.pid ?? 0, ask, 1200);
    child.kill('SIGSTOP');
    expect(await silent).toBeGreaterThanOrEqual(1188);
    expect(performance.now() - start).toBeGreaterThanOrEqual(1188);
  });

  it('forgets a silence that ended', async () => {
    const { child, ask } = await answering();
    let told = false;
    void watch(child.pid ?? 0, ask, 3000).then(() => (told = true));
    for (let round = 0; round < 2; round += 1) {
      child.kill('SIGSTOP');
      await delay(1500);
      child.kill('SIGCONT');
      await delay(1500);
    }
    expect(told).toBe(false);
  });

  it('says nothing after it was stopped', async () => {
    const { child, ask } = await answering();
    let told = false;
    void watch(child.pid ?? 0, ask, 600).then(() => (told = true));
    child.kill('SIGSTOP');
    for (const each of watches) each.stop();
    await delay(1000);
    expect(told).toBe(false);
  });
});
