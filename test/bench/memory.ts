/**
 * `npm run bench -- memory`: what the two daemons take with many layers attached. Each layer is its own small EROFS image,
 * attached through Prepare from a registry on loopback and read a little.
 *
 * RSS counts pages that processes share (Node's own program, mostly) in each of them; PSS divides them among those who
 * share them. The children that mount live for seconds, and are shown at the moment the last layer was mounted.
 */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { execa } from 'execa';
import { layout } from '../../daemon/layout.js';
import { chainIdOf } from '../../snapshotter/layer-reference.js';
import { standbyPids } from '../../snapshotter/standby.js';
import { smallErofs, withIdentity } from '../image/small-erofs.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry } from '../system/layer-registry.js';

const LAYERS = 50;
/** The two daemons together, in bytes. */
const GOAL = 250e6;
const MIB = 2 ** 20;

interface Memory {
  /** Bytes. */
  readonly rss: number;
  /** Bytes. */
  readonly pss: number;
}

async function memoryOf(pid: number): Promise<Memory> {
  const text = await readFile(`/proc/${pid}/smaps_rollup`, 'utf8');
  const bytes = (name: string): number =>
    Number(new RegExp(`^${name}:\\s+(\\d+) kB`, 'm').exec(text)?.[1] ?? Number.NaN) * 1024;
  return { rss: bytes('Rss'), pss: bytes('Pss') };
}

async function childrenOf(pid: number): Promise<number[]> {
  const lists = (await readdir(`/proc/${pid}/task`)).map((thread) =>
    readFile(`/proc/${pid}/task/${thread}/children`, 'utf8'),
  );
  return (await Promise.all(lists)).flatMap((list) => list.trim().split(' ').filter(Boolean).map(Number));
}

/** @returns the process that would take the place of the one that serves, once it is there */
async function standingBy(root: string): Promise<number> {
  for (;;) {
    const [pid] = await standbyPids(layout(root).controlSocket);
    if (pid !== undefined) return pid;
    await sleep(100);
  }
}

function row(name: string, { rss, pss }: Memory): void {
  console.log(
    `${name.padEnd(28)} ${(rss / 1e6).toFixed(1).padStart(8)} ${(pss / 1e6).toFixed(1).padStart(8)}`,
  );
}

const sum = (all: readonly Memory[]): Memory => ({
  rss: all.reduce((total, { rss }) => total + rss, 0),
  pss: all.reduce((total, { pss }) => total + pss, 0),
});

export async function memory(): Promise<void> {
  const stack = await Stack.create('erofs-nbd-bench');
  const registry = await LayerRegistry.start();
  let ok = false;
  try {
    const { image } = await smallErofs(stack.directory, MIB);
    const snapshotter = await stack.startSnapshotter({ logLevel: 'info' });
    const client = new SnapshotsClient(snapshotter.plugin.address);
    // Each on the one before, as the layers of an image are.
    let [parent, chainId] = ['', ''];
    for (let number = 1; number <= LAYERS; number += 1) {
      const { digest, labels } = registry.addLayer(withIdentity(image, number));
      chainId = chainIdOf(chainId, digest);
      const wanted = { ...labels, 'containerd.io/snapshot.ref': chainId };
      await client.prepare(`bench/${number}`, parent, wanted).catch(() => undefined);
      const [info] = await client.list(`labels."containerd.io/snapshot.ref"==${chainId}`);
      if (info === undefined) throw new Error(`layer ${number} was not attached; see ${snapshotter.log}`);
      parent = info.name;
    }
    // Node's, and the keeper of the FUSE connection.
    const blobserve = (await snapshotter.hello())?.pid ?? 0;
    const standing = await standingBy(snapshotter.plugin.root);
    const helpers = (await childrenOf(snapshotter.pid)).filter(
      (pid) => pid !== blobserve && pid !== standing,
    );
    const helping = sum(await Promise.all(helpers.map(memoryOf)));
    const { layers } = layout(snapshotter.plugin.root);
    for (const name of await readdir(layers)) {
      const file = path.join(layers, name, 'fs', 'data');
      await execa('dd', [`if=${file}`, 'of=/dev/null', 'bs=64k', 'count=4', 'skip=8', 'status=none']);
    }
    const [plane, data] = await Promise.all([memoryOf(snapshotter.pid), memoryOf(blobserve)]);
    const both = sum([plane, data]);
    const spare = await memoryOf(standing);
    const attached = (await snapshotter.devices())?.length ?? 0;
    ok = attached === LAYERS && both.rss < GOAL;
    console.log(`${attached} layers attached          ${'RSS MB'.padStart(8)} ${'PSS MB'.padStart(8)}`);
    row('snapshotter', plane);
    row('blobserve', data);
    row('both', both);
    row('one that stands by', spare);
    row(`${helpers.length} helpers, for seconds`, helping);
    console.log(`goal: both below ${GOAL / 1e6} MB RSS: ${ok ? 'reached' : 'missed'}`);
    console.log(
      JSON.stringify({
        layers: attached,
        rss_bytes: both.rss,
        pss_bytes: both.pss,
        snapshotter_rss_bytes: plane.rss,
        blobserve_rss_bytes: data.rss,
        standby_rss_bytes: spare.rss,
        standby_pss_bytes: spare.pss,
        helpers_rss_bytes: helping.rss,
      }),
    );
    for (const { name } of (await client.list()).reverse()) await client.remove(name);
    await client.cleanup();
    client.close();
  } finally {
    await registry.server.close();
    for (const trouble of await stack.remove()) console.error(trouble);
  }
  process.exitCode = ok ? 0 : 1;
}
