/**
 * Starts the data plane's process, which does nothing before it is told to serve.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { Socket } from 'node:net';
import process from 'node:process';
import { dataPlaneCommand } from '../daemon/data-plane-program.js';

export interface SpawnOptions {
  /** Of the program. */
  readonly args: readonly string[];
  /** Of the FUSE connection; -1: none. */
  readonly fuseDescriptor: number;
  /** Descriptor that the process logs to; `inherit`: where this one does. */
  readonly output: number | 'inherit';
  /** Another descriptor that it is to hold as long as it lives. */
  readonly lifeline: number | undefined;
}

/** @returns the process, in a session of its own, with a pipe as its standard input */
export function spawnBlobserve({ args, fuseDescriptor, output, lifeline }: SpawnOptions): ChildProcess {
  const child = spawn(
    process.execPath,
    [...dataPlaneCommand(), ...args, ...(fuseDescriptor >= 0 ? ['--fuse-descriptor', '3'] : [])],
    {
      stdio: [
        ...(['pipe', output, output] as const),
        fuseDescriptor >= 0 ? fuseDescriptor : 'ignore',
        ...(lifeline === undefined ? [] : [lifeline]),
      ],
      detached: true,
      cwd: '/',
      env: {
        ...process.env,
        // Cold disk reads each hold a thread of libuv's pool while they wait.
        UV_THREADPOOL_SIZE: process.env.UV_THREADPOOL_SIZE ?? '12',
        // Otherwise each of these threads keeps memory of its own that is free: 20 MB with 50 layers.
        MALLOC_ARENA_MAX: process.env.MALLOC_ARENA_MAX ?? '2',
      },
    },
  );
  child.unref();
  // Neither keeps a snapshotter that wants to end from doing so.
  if (child.stdin instanceof Socket) child.stdin.unref();
  child.stdin?.on('error', () => undefined);
  return child;
}
