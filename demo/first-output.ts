/**
 * Runs a program and notices the moment of its first output.
 */
import { execa } from 'execa';

export interface FirstOutput {
  /** All it printed, without white space at the end. */
  readonly output: string;
  /** performance.now() when the first byte of it arrived. */
  readonly at: number;
}

/**
 * @param onFirst called at that moment, before anything else can happen
 * @throws with what the program wrote to standard error when it fails, or prints nothing
 */
export async function runUntilOutput(
  command: string,
  parameters: readonly string[],
  environment: Readonly<Record<string, string>>,
  onFirst: () => void,
): Promise<FirstOutput> {
  const child = execa(command, parameters, { env: environment, stdin: 'ignore' });
  let at: number | undefined;
  child.stdout.once('data', () => {
    at = performance.now();
    onFirst();
  });
  const { stdout } = await child;
  if (at === undefined) throw new Error(`${command} ended well and printed nothing`);
  return { output: stdout.trimEnd(), at };
}
