/**
 * `erofs-nbd inspect FILE`: what a layer, a tarindex or an index is and says.
 */
import type { Command } from 'commander';
import type { FactValue, Inspection } from './inspect/inspection.js';
import { inspectFile } from './inspect/inspect-file.js';
import { formatSize, printable } from './quantities.js';
import { interruptible, print, printJson } from './terminal.js';

export function addInspectCommand(program: Command): void {
  program
    .command('inspect')
    .description(
      'say what a file is: tarindex, zinfo, zwin, EROFS image, tar or tar.gz layer, record of an index',
    )
    .argument('<file>', 'told by its content, whatever its name')
    .option('--json', 'as JSON; sizes and places in bytes')
    .action((file: string, options: { json?: true }) =>
      interruptible(async (signal) => {
        const inspection = await inspectFile(file, signal);
        await (options.json === true
          ? printJson({ file, kind: inspection.kind, ...inspection.facts })
          : print(renderInspection(inspection)));
      }),
    );
}

/** `largestSpan` → `largest span`; the unit is with the value. */
function title(key: string): string {
  return key
    .replace(/(Bytes|At)$/, (_, unit: string) => (unit === 'At' ? ' at' : ''))
    .replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`);
}

function text(key: string, value: FactValue): string {
  if (value === null) return '-';
  if (typeof value === 'boolean') return value ? 'yes' : 'no';
  if (typeof value === 'number') {
    return key.endsWith('Bytes') && value >= 1024 ? `${value} (${formatSize(value)})` : String(value);
  }
  if (typeof value === 'string') return printable(value, 500);
  if (isList(value)) return value.length === 0 ? 'none' : printable(value.join(', '), 500);
  const parts = Object.entries(value).map(([name, count]) => `${text(name, count)} ${title(name)}`);
  return parts.length === 0 ? 'none' : parts.join(', ');
}

/** Array.isArray does not tell lists that are read-only. */
function isList(value: readonly string[] | Readonly<Record<string, number>>): value is readonly string[] {
  return Array.isArray(value);
}

export function renderInspection({ kind, facts }: Inspection): string {
  const rows = Object.entries(facts).map(([key, value]) => [title(key), text(key, value)] as const);
  const width = Math.max(...rows.map(([name]) => name.length));
  return `${kind}\n${rows.map(([name, value]) => `  ${name.padEnd(width)}  ${value}\n`).join('')}`;
}
