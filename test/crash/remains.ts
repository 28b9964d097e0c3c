/**
 * What is left when every snapshot has been removed: it should be nothing, in the database, in the kernel, and on disk.
 */
import { readdir } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import path from 'node:path';
import Database from 'better-sqlite3';
import { mountTable } from '../../snapshotter/mount-table.js';
import { patience } from '../patience.js';
import { leftovers } from '../stack/leftovers.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { CrashNode } from './crash-node.js';

/** Rows by table, read beside the daemon that has the database open. */
function rows(file: string): Record<string, number> {
  const sqlite = new Database(file, { readonly: true, fileMustExist: true });
  try {
    const count = (table: string): number =>
      (sqlite.prepare(`SELECT count(*) AS n FROM ${table}`).get() as { n: number }).n;
    return { snapshots: count('snapshots'), layers: count('layers'), devices: count('devices') };
  } finally {
    sqlite.close();
  }
}

async function remainsNow(node: CrashNode): Promise<string[]> {
  const found: string[] = [];
  for (const [table, count] of Object.entries(rows(path.join(node.places.root, 'metadata.db')))) {
    if (count > 0) found.push(`${count} rows in ${table}`);
  }
  for (const directory of [node.places.snapshots, node.places.layers]) {
    for (const name of await readdir(directory)) found.push(path.join(directory, name));
  }
  for (const { path: device } of (await (await node.snapshotter).devices()) ?? [])
    found.push(`device ${device}`);
  // Looking at no mounted directory: this process is the registry that such a look may wait for. The connection's own
  // mount stays as long as the data plane does.
  for (const { mountPoint } of await mountTable()) {
    if (mountPoint.startsWith(`${node.directory}/`) && mountPoint !== node.places.fuse)
      found.push(`mount ${mountPoint}`);
  }
  return found;
}

/** @returns what is left of layers and snapshots, after as many calls of Cleanup as containerd would make in a while */
export async function remainingState(node: CrashNode): Promise<string[]> {
  const client = new SnapshotsClient((await node.snapshotter).plugin.address);
  const deadline = Date.now() + patience(30_000);
  try {
    for (;;) {
      const failed = await client.cleanup().then(
        () => [],
        (error: unknown) => [`Cleanup: ${String(error)}`],
      );
      const found = [...failed, ...(await remainsNow(node))];
      if (found.length === 0 || Date.now() > deadline) return found;
      await delay(500);
    }
  } finally {
    client.close();
  }
}

/** @returns what is left of the stopped stack besides plain files, and the cgroup that runc makes for all containers */
export async function remainingProcesses(directory: string): Promise<string[]> {
  const { mounts, loops, nbd, processes } = await leftovers(directory);
  return [mounts, loops, nbd, processes].flat();
}
