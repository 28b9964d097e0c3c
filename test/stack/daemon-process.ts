/**
 * A service as a child process: its log in a file, its readiness awaited, its end by pid.
 */
import { spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { patience } from '../patience.js';

export interface DaemonOptions {
  readonly name: string;
  readonly command: string;
  readonly parameters: readonly string[];
  /** What it says is appended to this file. */
  readonly log: string;
  /** Added to this process's environment. */
  readonly environment?: Readonly<Record<string, string>>;
  /** Descriptors of this process that it has from 3 on, and is told of as systemd tells of them (sd_listen_fds(3)). */
  readonly listening?: readonly { readonly name: string; readonly descriptor: number }[];
  /** Asked again and again until it is true or the process ends. */
  readonly ready: () => Promise<boolean>;
  /** In milliseconds; default 60 000, for machines that are busy. */
  readonly readyTimeout?: number;
}

export interface Daemon {
  readonly name: string;
  readonly pid: number;
  readonly log: string;
  /** Settles when the process has ended, with how. */
  readonly ended: Promise<string>;
  /**
   * SIGTERM, then SIGKILL for one that has not ended in time. Nothing happens when it has ended already.
   *
   * @param limit milliseconds; default 20 000
   */
  stop(limit?: number): Promise<void>;
  /** SIGKILL, as a crash would. */
  kill(): Promise<void>;
}

/** Starts the process and answers when it is ready. @throws with the end of its log when it is not */
export async function startDaemon(options: DaemonOptions): Promise<Daemon> {
  const { name, log } = options;
  const output = openSync(log, 'a');
  const { listening = [] } = options;
  const line = [options.command, ...options.parameters];
  // Only the process itself knows which one it is.
  const [command = '', ...parameters] =
    listening.length === 0 ? line : ['sh', '-c', 'LISTEN_PID=$$ exec "$@"', 'sh', ...line];
  const child = spawn(command, parameters, {
    // A group of its own: Ctrl-C at a terminal reaches only who started it, who then stops things in order.
    detached: true,
    stdio: ['ignore', output, output, ...listening.map(({ descriptor }) => descriptor)],
    env: {
      ...process.env,
      ...options.environment,
      ...(listening.length > 0 && {
        LISTEN_FDS: String(listening.length),
        LISTEN_FDNAMES: listening.map(({ name: label }) => label).join(':'),
      }),
    },
  });
  closeSync(output);
  let how: string | undefined;
  const ended = new Promise<string>((resolve) => {
    child.once('error', (error) => resolve((how = error.message)));
    child.once('exit', (code, signal) => resolve((how = signal ? `by ${signal}` : `with status ${code}`)));
  });
  const { pid } = child;
  if (pid === undefined) throw new Error(`cannot start ${name}: ${await ended}`);

  const kill = async (): Promise<void> => {
    if (how === undefined) child.kill('SIGKILL');
    await ended;
  };
  const stop = async (limit = patience(20_000)): Promise<void> => {
    if (how !== undefined) return;
    child.kill('SIGTERM');
    const timer = setTimeout(() => child.kill('SIGKILL'), limit);
    await ended;
    clearTimeout(timer);
  };

  const deadline = Date.now() + (options.readyTimeout ?? patience(60_000));
  while (!(await options.ready())) {
    const late = Date.now() > deadline;
    if (how !== undefined || late) {
      await kill();
      const what = late ? 'is not ready in time' : `ended ${how}`;
      throw new Error(`${name} ${what}; its log, ${log}, ends with:\n${await tail(log)}`);
    }
    await delay(20);
  }
  return { name, pid, log, ended, stop, kill };
}

async function tail(log: string, lines = 15): Promise<string> {
  const text = await readFile(log, 'utf8');
  return text.trimEnd().split('\n').slice(-lines).join('\n');
}
