/**
 * `npm run bench -- recovery [LAYERS]`: both daemons are killed with many layers attached (100), and a reader waits on each.
 * Then the snapshotter is started: how long until its socket answers, until the first reader goes on, until all did.
 *
 * Each layer is its own small EROFS image from a registry on loopback; what the readers want is in the cache.
 */
import { readdir } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { layout } from '../../daemon/layout.js';
import { processIdentity, waitForEnd } from '../../snapshotter/process-identity.js';
import { smallErofs, withIdentity } from '../image/small-erofs.js';
import { patience } from '../patience.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry } from '../system/layer-registry.js';

const MIB = 2 ** 20;
/** Milliseconds until the socket answers, beyond a Node process's own start. */
const GOAL = 1000;

async function nodeStart(): Promise<number> {
  const start = performance.now();
  await execa(process.execPath, ['-e', '0']);
  return performance.now() - start;
}

export async function recovery(arguments_: string[]): Promise<void> {
  const wanted = Number(arguments_[0] ?? 100);
  const stack = await Stack.create('erofs-nbd-bench');
  const registry = await LayerRegistry.start();
  let ok = false;
  try {
    const { image, data } = await smallErofs(stack.directory, MIB);
    let snapshotter = await stack.startSnapshotter({ logLevel: 'info' });
    const client = new SnapshotsClient(snapshotter.plugin.address);
    for (let number = 1; number <= wanted; number += 1) {
      const layer = registry.addLayer(withIdentity(image, number));
      await client.prepare(`bench/${number}`, '', layer.labels).catch(() => undefined);
      const [info] = await client.list(`labels."containerd.io/snapshot.ref"==${layer.chainId}`);
      if (info === undefined) throw new Error(`layer ${number} was not attached; see ${snapshotter.log}`);
    }
    const { layers } = layout(snapshotter.plugin.root);
    const files = (await readdir(layers)).map((name) => path.join(layers, name, 'fs', 'data'));
    for (const file of files) {
      await execa('cat', [file], { stdout: 'ignore' });
      // Out of the page cache again: a reader has to ask the device.
      await execa('dd', [`if=${file}`, 'iflag=nocache', 'count=0', 'status=none']);
    }

    const blobserve = await processIdentity((await snapshotter.hello())?.pid ?? 0);
    await snapshotter.kill();
    if (blobserve === undefined) throw new Error('no data plane runs');
    process.kill(blobserve.pid, 'SIGKILL');
    await waitForEnd(blobserve, patience(10_000));
    const finished: number[] = [];
    let wrong = 0;
    const readers = files.map(async (file) => {
      const { stdout } = await execa('cat', [file], { encoding: 'buffer', timeout: patience(120_000) });
      finished.push(performance.now());
      if (!Buffer.from(stdout).equals(data)) wrong += 1;
    });
    const settled = Promise.allSettled(readers);
    // All of them in the kernel, waiting.
    await new Promise((resolve) => setTimeout(resolve, patience(3000)));
    const early = finished.length;

    const before = await nodeStart();
    const start = performance.now();
    snapshotter = await stack.startSnapshotter({ logLevel: 'info' });
    const answers = performance.now() - start;
    const failed = (await settled).filter(({ status }) => status === 'rejected').length;
    const after = await nodeStart();
    const [first, last] = [Math.min(...finished) - start, Math.max(...finished) - start];
    const attached = (await snapshotter.devices())?.length ?? 0;
    const node = (before + after) / 2;
    ok = failed === 0 && wrong === 0 && early === 0 && attached === wanted && answers < GOAL + node;

    console.log(
      `${attached} layers attached, ${files.length} readers waiting, both daemons killed; from the start on:`,
    );
    const row = (what: string, value: number): void =>
      console.log(`  ${what.padEnd(40)} ${value.toFixed(0).padStart(7)} ms`);
    row('the socket answers', answers);
    row('the first reader goes on', first);
    row('the last reader is done', last);
    row('for comparison: node -e 0', node);
    console.log(
      `readers that failed: ${failed}; that got wrong bytes: ${wrong}; that had not waited: ${early}`,
    );
    console.log(
      `goal: the socket answers within ${GOAL} ms and a Node start: ${answers < GOAL + node ? 'reached' : 'missed'}`,
    );
    console.log(
      JSON.stringify({
        ok,
        layers: attached,
        failed,
        wrong,
        socket_ms: Math.round(answers),
        first_read_ms: Math.round(first),
        all_ms: Math.round(last),
        node_start_ms: Math.round(node),
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
