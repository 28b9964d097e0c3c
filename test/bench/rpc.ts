/**
 * How long containerd waits for a snapshotter: Prepare, Mounts, Commit and Remove of ours beside those of containerd's
 * overlayfs snapshotter behind the same kind of socket, while each holds 1, 100 and 1000 snapshots.
 */
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { buildGoPrograms } from '../conformance/go-programs.js';
import { removeAbandonedStacks } from '../stack/abandoned.js';
import { startDaemon } from '../stack/daemon-process.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import { grpcAnswers } from '../stack/socket.js';
import { Stack } from '../stack/stack.js';

const PREFIX = 'erofs-nbd-rpc';
const HELD = [1, 100, 1000] as const;
const CALLS = ['prepare', 'mounts', 'commit', 'remove'] as const;
/** Rounds that are measured, after some that are not: most at first, until both sides of the socket are compiled. */
const ROUNDS = 300;
const WARM_UP = [1000, 100, 100] as const;

type Call = (typeof CALLS)[number];
type Times = Record<Call, number[]>;

/** The value below which that part of the sorted times is. */
function quantile(times: readonly number[], part: number): number {
  const sorted = [...times].sort((a, b) => a - b);
  return sorted[Math.min(Math.floor(part * sorted.length), sorted.length - 1)] ?? Number.NaN;
}

/** Fills it up to `count` snapshots, all on the first. */
async function hold(client: SnapshotsClient, from: number, count: number): Promise<void> {
  for (let index = from; index < count; index++) {
    await client.prepare(`key-${index}`, index === 0 ? '' : 'held-0');
    await client.commit(`held-${index}`, `key-${index}`);
  }
}

/** One container's worth of calls. */
async function round(client: SnapshotsClient, times: Times | undefined): Promise<void> {
  const timed = async (call: Call, work: Promise<unknown>): Promise<void> => {
    const startedAt = performance.now();
    await work;
    times?.[call].push(performance.now() - startedAt);
  };
  await timed('prepare', client.prepare('bench key', 'held-0'));
  await timed('mounts', client.mounts('bench key'));
  await timed('commit', client.commit('bench', 'bench key'));
  await timed('remove', client.remove('bench'));
}

export async function rpc(): Promise<void> {
  const programs = await buildGoPrograms();
  await removeAbandonedStacks(PREFIX);
  const stack = await Stack.create(PREFIX);
  const clients: SnapshotsClient[] = [];
  try {
    const snapshotter = await stack.startSnapshotter({ logLevel: 'info' });
    const [socket, root] = ['overlayfs.sock', 'overlayfs'].map((name) => path.join(stack.directory, name));
    await mkdir(root as string);
    const reference = await startDaemon({
      name: 'overlayfs',
      command: programs.overlayfs,
      parameters: [socket as string, root as string],
      log: path.join(stack.directory, 'overlayfs.log'),
      ready: () => grpcAnswers(socket as string),
    });
    try {
      const ours = new SnapshotsClient(snapshotter.plugin.address);
      const overlayfs = new SnapshotsClient(socket as string);
      clients.push(ours, overlayfs);
      const rows = [];
      console.log('milliseconds       ours            overlayfs');
      console.log('snapshots call     median    p99   median    p99   ratio of medians');
      for (const [index, snapshots] of HELD.entries()) {
        for (const client of clients) await hold(client, HELD[index - 1] ?? 0, snapshots);
        const empty = (): Times => ({ prepare: [], mounts: [], commit: [], remove: [] });
        const [mine, theirs] = [empty(), empty()];
        for (let count = -(WARM_UP[index] ?? 0); count < ROUNDS; count++) {
          // In turns, so that what else the machine does falls on both.
          await round(ours, count < 0 ? undefined : mine);
          await round(overlayfs, count < 0 ? undefined : theirs);
        }
        for (const call of CALLS) {
          const [a, b] = [mine[call], theirs[call]];
          const row = {
            call,
            snapshots,
            ours_ms: quantile(a, 0.5),
            overlayfs_ms: quantile(b, 0.5),
            ratio: quantile(a, 0.5) / quantile(b, 0.5),
            ours_p99_ms: quantile(a, 0.99),
            overlayfs_p99_ms: quantile(b, 0.99),
          };
          const cells = [row.ours_ms, row.ours_p99_ms, row.overlayfs_ms, row.overlayfs_p99_ms];
          const numbers = cells.map((value) => value.toFixed(2).padStart(7)).join(' ');
          console.log(
            `${String(snapshots).padStart(9)} ${call.padEnd(7)}${numbers}  ${row.ratio.toFixed(2)}`,
          );
          rows.push(row);
        }
      }
      console.log(
        JSON.stringify({ rows }, (_, value: unknown) =>
          typeof value === 'number' && !Number.isInteger(value) ? Number(value.toFixed(3)) : value,
        ),
      );
    } finally {
      await reference.stop();
    }
  } finally {
    for (const client of clients) client.close();
    for (const trouble of await stack.remove()) console.log(`not as it should be: ${trouble}`);
  }
}
