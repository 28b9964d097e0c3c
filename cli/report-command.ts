/**
 * `erofs-nbd report IMAGE|CONTAINER`: what was read of it, and what was fetched for that, as a page.
 */
import { writeFile } from 'node:fs/promises';
import type { Command } from 'commander';
import { VERSION } from '../daemon/version.js';
import { CallError } from '../proto/unary-call.js';
import { ContainerdClient } from '../snapshotter/containerd-client.js';
import { noContainerd, withContainerdOptions, type ContainerdOptions } from './containerd-options.js';
import { Failure } from './failure.js';
import { nodeConfiguration, withNodeOptions, type NodeOptions } from './node.js';
import { formatSize } from './quantities.js';
import { gatherRecord } from './report/gather.js';
import { imageLayers } from './report/image-layers.js';
import { reportPage } from './report/page.js';
import { interruptible, print, printJson } from './terminal.js';

interface ReportCommandLine extends NodeOptions, ContainerdOptions {
  readonly output: string;
  readonly json?: true;
}

export function addReportCommand(program: Command): void {
  const command = program
    .command('report')
    .description('draw what was read of an image, when, and what was fetched for that')
    .argument('<image|container>', "an image of containerd's, or the ID of a container")
    .option('-o, --output <file>', 'the page, HTML; "-": standard output', 'report.html');
  withNodeOptions(withContainerdOptions(command))
    .option('--json', 'write the record as JSON instead of a page; sizes in bytes, times in milliseconds')
    .action((wanted: string, options: ReportCommandLine) =>
      interruptible((signal) => report(wanted, options, signal)),
    );
}

async function report(wanted: string, options: ReportCommandLine, signal: AbortSignal): Promise<void> {
  const configuration = nodeConfiguration(options);
  const containerd = new ContainerdClient(options.address ?? configuration.containerd.address);
  try {
    const { layers, ...names } = await imageLayers(containerd, { namespace: options.namespace }, wanted);
    const record = await gatherRecord(configuration.root, layers, signal);
    if (record.layers.length === 0) {
      throw new Failure(
        `no layer of ${names.image} is attached: run a container of it with this snapshotter, and ask again`,
      );
    }
    if (options.json === true) return await printJson({ ...names, ...record });
    const page = reportPage({ ...names, layers: layers.length, version: VERSION }, record);
    if (options.output === '-') return await print(page);
    await writeFile(options.output, page);
    await print(`${options.output}: ${formatSize(Buffer.byteLength(page))}; open it in a browser\n`);
  } catch (error) {
    throw error instanceof CallError ? (noContainerd(error, containerd.address) ?? error) : error;
  } finally {
    containerd.close();
  }
}
