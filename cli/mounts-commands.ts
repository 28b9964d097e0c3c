/**
 * `erofs-nbd umount`, `list` and `reattach`: what becomes of mounts by hand.
 */
import process from 'node:process';
import { type Command, Option } from 'commander';
import { createLogger } from '../daemon/log.js';
import { mountTable } from '../snapshotter/mount-table.js';
import { Failure, UsageError } from './failure.js';
import { devicesOf, type ListedMount, listMounts } from './mount/listing.js';
import { type Reattached, reattach, reattachUntilServed } from './mount/reattach.js';
import type { RecordedMount } from './mount/record.js';
import {
  demandRoot,
  mountMeant,
  mountsIn,
  type RuntimeOptions,
  withRuntimeOption,
} from './mount/runtime-option.js';
import { unmountByHand } from './mount/umount.js';
import { formatShare, formatSize } from './quantities.js';
import { table } from './table.js';
import { interruptible, print, printJson } from './terminal.js';

export function addUmountCommand(program: Command): void {
  withRuntimeOption(
    program
      .command('umount')
      .description('unmount what erofs-nbd mount has mounted, and end what serves it; the cache stays')
      .argument('<directory>', 'where it is mounted'),
  ).action(async (directory: string, { runtime }: RuntimeOptions) => {
    demandRoot('unmounting');
    const mount = await mountMeant(runtime, directory);
    await interruptible(() => unmountByHand(mount, createLogger('erofs-nbd umount', 'error', 'text')));
  });
}

export function addListCommand(program: Command): void {
  withRuntimeOption(
    program
      .command('list')
      .description('show what erofs-nbd mount has mounted, and whether it is served')
      .option('--json', 'as JSON; sizes in bytes'),
  ).action(async ({ runtime, json }: RuntimeOptions & { json?: true }) => {
    const mounts = await listMounts(await mountsIn(runtime));
    await (json === true ? printJson({ mounts }) : print(renderList(mounts, process.stdout.columns)));
  });
}

interface ReattachOptions extends RuntimeOptions {
  readonly all?: true;
  readonly wait?: true;
  readonly json?: true;
}

export function addReattachCommand(program: Command): void {
  withRuntimeOption(
    program
      .command('reattach')
      .description(
        'have what erofs-nbd mount has mounted served again; it is by itself when its process ends',
      )
      .argument('[device-or-directory]', '/dev/nbdN, or where it is mounted')
      .option('--all', 'all that is mounted this way')
      .option('--json', 'print the result as JSON')
      .addOption(new Option('--wait', 'until it is served').hideHelp()),
  ).action(reattachMounts);
}

async function reattachMounts(text: string | undefined, options: ReattachOptions): Promise<void> {
  const { runtime } = options;
  if ((text === undefined) === (options.all === undefined)) {
    throw new UsageError('name a device or a directory, or give --all');
  }
  demandRoot('reattaching');
  const log = createLogger('erofs-nbd reattach', 'warn', 'text');
  const entries = await mountTable();
  const meant =
    text === undefined
      ? await mountsIn(runtime)
      : [await mountMeant(runtime, text, (mount) => devicesOf(mount, entries))];
  if (options.wait === true) {
    await Promise.all(meant.map((mount) => reattachUntilServed(mount, log)));
    return;
  }
  const outcomes = await Promise.allSettled(meant.map((mount) => reattach(mount, log)));
  await report(meant, outcomes, options.json === true);
}

async function report(
  meant: readonly RecordedMount[],
  outcomes: readonly PromiseSettledResult<Reattached>[],
  json: boolean,
): Promise<void> {
  const done = outcomes.flatMap((outcome) => (outcome.status === 'fulfilled' ? [outcome.value] : []));
  if (json) await printJson({ mounts: done });
  else await print(done.map(sentence).join(''));
  const failed = outcomes.flatMap((outcome, at) =>
    outcome.status === 'rejected' ? [`${meant[at]?.record.mountPoint}: ${messageOf(outcome.reason)}`] : [],
  );
  if (failed.length > 0) throw new Failure(failed.join('; '));
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

function sentence({ mountPoint, source, pid, mount }: Reattached): string {
  const outcome = {
    kept: 'what is open there goes on',
    'mounted again': 'its devices were lost and it was mounted again: what was open there gives errors',
    'not mounted': `not mounted there any more; erofs-nbd umount ${mountPoint} takes away what is left`,
  }[mount];
  return `${source} on ${mountPoint}: served by process ${pid ?? '?'}, ${outcome}\n`;
}

function renderList(mounts: readonly ListedMount[], width: number | undefined): string {
  if (mounts.length === 0) return 'nothing is mounted by erofs-nbd mount\n';
  const rows = mounts.map(({ mountPoint, source, state, pid, layers }) => {
    const bytes = layers.reduce((sum, { served }) => sum + (served?.blobBytes ?? 0), 0);
    const cached = layers.reduce((sum, { served }) => sum + (served?.cachedBytes ?? 0), 0);
    return [
      mountPoint,
      source,
      state,
      pid === null ? '-' : String(pid),
      String(layers.length),
      pid === null ? '-' : formatSize(bytes),
      pid === null ? '-' : formatShare(bytes > 0 ? Math.min(1, cached / bytes) : undefined),
    ];
  });
  return table(
    [
      { title: 'MOUNTED ON' },
      { title: 'SOURCE' },
      { title: 'STATE' },
      { title: 'PID', align: 'right' },
      { title: 'LAYERS', align: 'right' },
      { title: 'SIZE', align: 'right' },
      { title: 'HERE', align: 'right' },
    ],
    rows,
    width,
  );
}
