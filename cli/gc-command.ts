/**
 * `erofs-nbd gc`: has the daemons free what nothing uses. They know what is in use and keep it so while they delete; so it is
 * refused when they are down.
 */
import path from 'node:path';
import * as grpc from '@grpc/grpc-js';
import type { Command } from 'commander';
import { control } from '../proto/messages.js';
import { nodeService } from '../proto/service.js';
import { CallError, unaryCall } from '../proto/unary-call.js';
import { Failure } from './failure.js';
import { nodeConfiguration, withNodeOptions, type NodeOptions } from './node.js';
import { formatSize } from './quantities.js';
import { table } from './table.js';
import { print, printJson } from './terminal.js';

interface GcCommandLine extends NodeOptions {
  readonly all?: true;
  readonly dryRun?: true;
  readonly json?: true;
}

const KINDS: Readonly<Record<number, 'blob' | 'index' | 'unfinished' | 'record'>> = {
  [control.GarbageKind.GARBAGE_BLOB]: 'blob',
  [control.GarbageKind.GARBAGE_INDEX]: 'index',
  [control.GarbageKind.GARBAGE_UNFINISHED]: 'unfinished',
  [control.GarbageKind.GARBAGE_RECORD]: 'record',
};

export function addGcCommand(program: Command): void {
  withNodeOptions(program.command('gc'))
    .description('free what nothing uses: cached blobs and indexes of layers that no image has any more')
    .option(
      '--all',
      'also the cached blobs of layers that are not attached now; they are fetched again when wanted',
    )
    .option('--dry-run', 'only tell what would be freed')
    .option('--json', 'as JSON; sizes in bytes')
    .action(collect);
}

async function collect(options: GcCommandLine): Promise<void> {
  const { root, address } = nodeConfiguration(options);
  const dryRun = options.dryRun === true;
  const freed = await askSnapshotter(root, address, { all: options.all === true, dryRun });
  const garbage = freed.map((given) => {
    const { kind, digest, bytes } = control.Garbage.create(given);
    return { kind: KINDS[kind] ?? 'unfinished', digest, bytes };
  });
  const bytes = garbage.reduce((sum, one) => sum + one.bytes, 0);
  if (options.json === true) return printJson({ dryRun, bytes, garbage });
  const rows = garbage.map((one) => [one.kind, one.digest, formatSize(one.bytes)]);
  const listed =
    rows.length === 0
      ? ''
      : table([{ title: 'WHAT' }, { title: 'OF BLOB' }, { title: 'SIZE', align: 'right' }], rows);
  await print(`${listed}${formatSize(bytes)} ${dryRun ? 'would be freed' : 'freed'}\n`);
}

/** @throws {Failure} it does not answer, is older, or looks after another root */
async function askSnapshotter(
  root: string,
  address: string,
  request: control.FreeUnusedRequest.$Properties,
): Promise<control.Garbage.$Properties[]> {
  const client = new grpc.Client(`unix:${address}`, grpc.credentials.createInsecure(), {
    'grpc.enable_http_proxy': 0,
  });
  try {
    // Asked first: whose root it is.
    const known = await unaryCall(client, nodeService.freeUnused, { ...request, dryRun: true });
    if (path.resolve(known.root) !== path.resolve(root)) {
      throw new Failure(
        `the snapshotter on ${address} looks after ${known.root}, not ${root}: nothing was freed; name its configuration ` +
          'with --config',
      );
    }
    if (request.dryRun === true) return known.garbage;
    return (await unaryCall(client, nodeService.freeUnused, request)).garbage;
  } catch (error) {
    throw error instanceof CallError ? explained(error, root, address) : error;
  } finally {
    client.close();
  }
}

function explained(error: CallError, root: string, address: string): Error {
  if (error.code === grpc.status.UNIMPLEMENTED) {
    return new Failure(
      `the snapshotter on ${address} is an older one: restart it, containers go on meanwhile`,
    );
  }
  if (error.code !== grpc.status.UNAVAILABLE || !error.message.includes('No connection established'))
    return error;
  return new Failure(
    `no snapshotter answers on ${address}, and only it knows what is in use: start it and try again. Without it nothing is ` +
      `freed; when ${root} is never to be used again, "erofs-nbd-snapshotter --teardown", then delete it`,
    undefined,
    { cause: error },
  );
}
