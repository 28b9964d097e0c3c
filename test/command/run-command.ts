/**
 * The command `erofs-nbd` as an operator runs it: the compiled program, in a process of its own.
 */
import path from 'node:path';
import { execa, type Options } from 'execa';
import { checkout } from '../debian/packages.js';

export const COMMAND = path.join(checkout, 'dist', 'cli', 'main.js');

export interface CommandResult {
  readonly exitCode: number | undefined;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs it to its end, whatever that is. */
export async function erofsNbd(parameters: readonly string[], options: Options = {}): Promise<CommandResult> {
  const { exitCode, stdout, stderr } = await execa(process.execPath, [COMMAND, ...parameters], {
    reject: false,
    stripFinalNewline: false,
    ...options,
  });
  return { exitCode, stdout: String(stdout), stderr: String(stderr) };
}

/** As a user without any rights. */
export const NOBODY = { uid: 65_534, gid: 65_534 } as const;

/** Why the command cannot be run as {@link NOBODY}; undefined when it can. */
export async function nobodyCannot(): Promise<string | undefined> {
  if (process.getuid?.() !== 0) return 'not root: cannot become another user';
  const { exitCode } = await erofsNbd(['--version'], NOBODY);
  return exitCode === 0 ? undefined : `${COMMAND} cannot be run by other users`;
}
