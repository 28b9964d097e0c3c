import { execa } from 'execa';
import { describe, expect, it } from 'vitest';
import { patience } from './patience.js';

const compiled = (file: string): string =>
  JSON.stringify(new URL(`../dist/blobserve/${file}`, import.meta.url).href);

describe('a thread that is ended', () => {
  it('at any moment of its start does not take the process along', async () => {
    const program = `
      import { Worker } from 'node:worker_threads';
      import { endsOnceStarted } from ${compiled('end-thread.js')};
      import { ArithmeticRing } from ${compiled('layer/gzip/arithmetic-ring.js')};
      for (let time = 0; time < 60; time++) {
        const workerData = new SharedArrayBuffer(ArithmeticRing.bytes);
        const program = new URL(${compiled('layer/gzip/arithmetic-thread-main.js')});
        const worker = new Worker(program, { workerData, execArgv: [] });
        const end = endsOnceStarted(worker);
        await new Promise((resolve) => setTimeout(resolve, time));
        await end();
        if (worker.threadId !== -1) throw new Error('it has not ended');
      }`;
    // In a process of its own: what goes wrong ends it.
    const { exitCode, signal, stderr } = await execa(
      process.execPath,
      ['--input-type=module', '-e', program],
      { reject: false, timeout: patience(60_000) },
    );
    expect({ exitCode, signal, stderr }).toEqual({ exitCode: 0, signal: undefined, stderr: '' });
  });
});
