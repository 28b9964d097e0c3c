/**
 * Runs a program that answers with a secret: with a limit on its time and on its answer, its whole process group ended
 * when it overruns, and nothing of what it says in any error.
 */
import { spawn } from 'node:child_process';
import { homedir } from 'node:os';

export interface ProgramOptions {
  readonly parameters: readonly string[];
  /** Written to its standard input. */
  readonly input: string;
  /** Beside our own environment. */
  readonly environment?: Readonly<Record<string, string>>;
  readonly timeoutMs: number;
}

/** Longest answer, in bytes. */
const MAX_OUTPUT = 262_144;

export interface ProgramResult {
  readonly code: number;
  readonly output: string;
}

/**
 * Resolves with how the program ended and what it wrote to standard output.
 *
 * @throws {Error} when it cannot be started, takes too long or says too much; the message names it and its limit
 */
export function runProgram(program: string, options: ProgramOptions): Promise<ProgramResult> {
  return new Promise((resolve, reject) => {
    const child = spawn(program, options.parameters, {
      // A group of its own: what it starts holds its output open and is ended with it.
      detached: true,
      stdio: ['pipe', 'pipe', 'ignore'],
      env: { HOME: homedir(), ...process.env, ...options.environment },
    });
    const chunks: Buffer[] = [];
    let length = 0;
    let settled = false;
    const settle = (action: () => void) => {
      if (settled) return;
      settled = true;
      clearTimeout(timer);
      child.stdout.destroy();
      child.stdin.destroy();
      action();
    };
    const giveUp = (what: string) =>
      settle(() => {
        try {
          if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
        } catch {
          // It has just ended.
        }
        reject(new Error(`${program} ${what}`));
      });
    const timer = setTimeout(
      () => giveUp(`took longer than ${options.timeoutMs} ms and was ended`),
      options.timeoutMs,
    );
    child.on('error', (error: NodeJS.ErrnoException) =>
      settle(() => reject(new Error(`${program} cannot be started (${error.code ?? 'unknown error'})`))),
    );
    child.stdout.on('data', (chunk: Buffer) => {
      length += chunk.length;
      if (length > MAX_OUTPUT) giveUp(`answered with more than ${MAX_OUTPUT} bytes`);
      else chunks.push(chunk);
    });
    child.on('close', (code) =>
      settle(() => resolve({ code: code ?? -1, output: Buffer.concat(chunks).toString('utf8') })),
    );
    // A program that does not read its input is no trouble.
    child.stdin.on('error', () => undefined);
    child.stdin.end(options.input);
  });
}
