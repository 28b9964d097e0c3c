/**
 * Rows as columns of text.
 */
import { printable } from './quantities.js';

export interface Column {
  readonly title: string;
  readonly align?: 'left' | 'right';
}

/**
 * @param width of the terminal; lines are cut there, so that they do not wrap. Default: as long as they are
 * @returns lines, each with its newline
 */
export function table(
  columns: readonly Column[],
  rows: readonly (readonly string[])[],
  width = Infinity,
): string {
  const clean = rows.map((row) => columns.map((_, at) => printable(row[at] ?? '')));
  const widths = columns.map(({ title }, at) =>
    Math.max(title.length, ...clean.map((row) => row[at]?.length ?? 0)),
  );
  const line = (cells: readonly string[]): string =>
    cells
      .map((cell, at) =>
        columns[at]?.align === 'right' ? cell.padStart(widths[at] ?? 0) : cell.padEnd(widths[at] ?? 0),
      )
      .join('  ')
      .trimEnd()
      .slice(0, width);
  return [columns.map(({ title }) => title), ...clean].map((row) => `${line(row)}\n`).join('');
}
