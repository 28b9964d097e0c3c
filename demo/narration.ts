/**
 * What the demo says while it works: one line per step. On a terminal a line appears when its step begins and is
 * completed in place; elsewhere it is printed once, when the step has ended.
 */
const terminal = process.stdout.isTTY === true;
const colours = terminal && process.env['NO_COLOR'] === undefined;

const paint =
  (code: number) =>
  (text: string): string =>
    colours ? `\x1b[${code}m${text}\x1b[0m` : text;

export const bold = paint(1);
export const dim = paint(2);
const green = paint(32);
const red = paint(31);

const NAME_WIDTH = 24;

/** A step under way. */
export interface Step {
  /** Says what it is at; seen on a terminal only. */
  readonly note: (text: string) => void;
}

export function say(text = ''): void {
  process.stdout.write(`${text}\n`);
}

/** Runs a step and tells its outcome: what `work` returns as `said`, and how long it took. */
export async function step<Result>(
  name: string,
  work: (step: Step) => Promise<readonly [result: Result, said: string]>,
): Promise<Result> {
  const begin = performance.now();
  const draw = (mark: string, text: string): void => {
    if (!terminal) return;
    // A line that wraps could not be redrawn in place.
    const room = Math.max(10, (process.stdout.columns || 80) - NAME_WIDTH - 6);
    process.stdout.write(`\r\x1b[K  ${mark} ${name.padEnd(NAME_WIDTH)} ${dim(text.slice(0, room))}`);
  };
  const finish = (mark: string, text: string): void => {
    const seconds = ((performance.now() - begin) / 1000).toFixed(1);
    const line = `  ${mark} ${name.padEnd(NAME_WIDTH)} ${text.padEnd(50)} ${dim(`${seconds.padStart(6)} s`)}`;
    process.stdout.write(`${terminal ? '\r\x1b[K' : ''}${line}\n`);
  };
  draw('·', '…');
  try {
    const [result, said] = await work({ note: (text) => draw('·', text) });
    finish(green('✓'), said);
    return result;
  } catch (error) {
    finish(red('✗'), 'failed');
    throw error;
  }
}

/** A table of two columns. */
export function table(rows: readonly (readonly [name: string, value: string])[]): void {
  const width = Math.max(...rows.map(([name]) => name.length));
  for (const [name, value] of rows) say(`    ${dim(name.padEnd(width))}   ${value}`);
}

/** `12.3 MiB`. */
export function mebibytes(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

/** The last line of every run: for machines. */
export function closingLine(result: Readonly<Record<string, unknown>>): void {
  process.stdout.write(`${JSON.stringify(result)}\n`);
}
