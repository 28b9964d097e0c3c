/**
 * `erofs-nbd status`: what is served at the moment, and how it goes.
 */
import process from 'node:process';
import type { Command } from 'commander';
import { nodeConfiguration, withNodeOptions, type NodeOptions } from './node.js';
import { gatherStatus } from './status-report.js';
import { renderStatus } from './status-view.js';
import { print, printJson } from './terminal.js';

export function addStatusCommand(program: Command): void {
  withNodeOptions(program.command('status'))
    .description('show the layers that are served, what was fetched, and how the registries are')
    .option('--json', 'as JSON; sizes in bytes, times in milliseconds, shares from 0 to 1')
    .action(async (options: NodeOptions & { json?: true }) => {
      const report = await gatherStatus(nodeConfiguration(options));
      await (options.json === true ? printJson(report) : print(renderStatus(report, process.stdout.columns)));
    });
}
