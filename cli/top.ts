/**
 * `erofs-nbd top`: `status`, again and again.
 */
import process from 'node:process';
import { setTimeout as sleep } from 'node:timers/promises';
import { InvalidArgumentError, type Command } from 'commander';
import type { Configuration } from '../daemon/configuration.js';
import { Failure } from './failure.js';
import { nodeConfiguration, withNodeOptions, type NodeOptions } from './node.js';
import { gatherStatus, type StatusReport } from './status-report.js';
import { renderRates, renderStatus } from './status-view.js';
import { interruptible, print } from './terminal.js';

interface TopOptions extends NodeOptions {
  readonly interval: number;
  readonly count?: number;
  readonly json?: true;
}

/** ECMA-48: hide and show the cursor; go to the first place; erase what is behind the cursor in its line, on the screen. */
const HIDE_CURSOR = '\x1b[?25l';
const SHOW_CURSOR = '\x1b[?25h';
const HOME = '\x1b[H';
const ERASE_LINE = '\x1b[K';
const ERASE_REST = '\x1b[J';

function number(text: string, minimum: number, what: string): number {
  const value = Number(text);
  if (text.trim() !== '' && value >= minimum && value <= 86_400) return value;
  throw new InvalidArgumentError(`Expected ${what}.`);
}

export function addTopCommand(program: Command): void {
  withNodeOptions(program.command('top'))
    .description('show status again and again, with what happens per second')
    .option(
      '--interval <seconds>',
      'between two looks',
      (text) => number(text, 0.1, '0.1 to 86400 seconds'),
      2,
    )
    .option('--count <number>', 'how many looks (default: until interrupted)', (text) =>
      Math.floor(number(text, 1, 'a number of at least 1')),
    )
    .option('--json', 'a line of JSON per look, as status --json')
    .action((options: TopOptions) =>
      interruptible((signal) => watch(nodeConfiguration(options), options, signal)),
    );
}

async function watch(configuration: Configuration, options: TopOptions, signal: AbortSignal): Promise<void> {
  const screen = process.stdout.isTTY && options.json !== true;
  let before: { readonly report: StatusReport; readonly at: number } | undefined;
  if (screen) await print(HIDE_CURSOR);
  try {
    for (let look = 1; ; look++) {
      const at = performance.now();
      const report = await lookOnce(configuration, before === undefined);
      if (options.json === true) {
        await print(`${JSON.stringify(report instanceof Failure ? { error: report.message } : report)}\n`);
      } else {
        const rates =
          before !== undefined && !(report instanceof Failure)
            ? renderRates(before.report, report, (at - before.at) / 1000)
            : '';
        const text =
          report instanceof Failure
            ? `${report.message}\n`
            : `${rates}${renderStatus(report, process.stdout.columns)}`;
        await print(screen ? onScreen(text, process.stdout.rows) : `${look > 1 ? '\n' : ''}${text}`);
      }
      if (!(report instanceof Failure)) before = { report, at };
      if (look === options.count) return;
      await sleep(options.interval * 1000, undefined, { signal });
    }
  } finally {
    if (screen) await print(SHOW_CURSOR);
  }
}

/** A data plane that dies is started again: whoever watches sees that, and does not have to begin anew. */
async function lookOnce(configuration: Configuration, first: boolean): Promise<StatusReport | Failure> {
  try {
    return await gatherStatus(configuration);
  } catch (error) {
    if (first || !(error instanceof Failure)) throw error;
    return error;
  }
}

/** Written over what was there, so that nothing flickers, and cut where the screen ends. */
export function onScreen(text: string, rows: number): string {
  const lines = text
    .trimEnd()
    .split('\n')
    .slice(0, Math.max(1, rows - 1));
  return `${HOME}${lines.map((line) => `${line}${ERASE_LINE}\n`).join('')}${ERASE_REST}`;
}
