/**
 * `npm run bench -- link`: a cold start over a slow link, with and without what spares requests. An image is pulled and run
 * with an empty cache, tar.gz layers with their index, over a link of 50 Mbit/s and 20 ms (test/stack/shaped-link.ts);
 * requests and bytes are counted at the registry until the first output.
 *
 *     npm run bench -- link [--mbit 50] [--ms 20] [--runs 1]
 */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { layout } from '../../daemon/layout.js';
import { runUntilOutput } from '../../demo/first-output.js';
import { buildDebianImage } from '../image/debian-image.js';
import type { LayerFormat } from '../image/layer-blob.js';
import { layerBytes, type Image } from '../image/oci-layout.js';
import type { Registry } from '../stack/registry.js';
import { startShapedLink } from '../stack/shaped-link.js';
import { Stack } from '../stack/stack.js';

const FORMATS: readonly LayerFormat[] = ['tar+gzip', 'erofs-lz4hc'];

/** What is compared; the last one is how it comes. */
const VARIANTS: Readonly<Record<string, string>> = {
  'a request per span': 'max_range = "256KiB"\nreadahead = "0B"\n',
  'spans merged': 'readahead = "0B"\n',
  'merged, readahead': '',
};
const AS_IT_COMES = 'merged, readahead';

/** One request may be made for so many bytes. */
const BYTES_PER_REQUEST = 256 * 1024;

interface Row {
  readonly format: LayerFormat;
  readonly variant: string;
  readonly imageBytes: number;
  readonly requests: number;
  readonly bytes: number;
  readonly pullSeconds: number;
  /** From the start of the pull to the first byte that the container printed. */
  readonly outputSeconds: number;
}

interface Traffic {
  readonly requests: number;
  readonly bytes: number;
}

function trafficOf(registry: Registry, image: Image): Traffic {
  let [requests, bytes] = [0, 0];
  for (const digest of new Set(image.layers.map((layer) => layer.digest))) {
    const traffic = registry.traffic().get(digest);
    requests += traffic?.requests ?? 0;
    bytes += traffic?.bytes ?? 0;
  }
  return { requests, bytes };
}

interface Link {
  readonly bitsPerSecond: number;
  readonly roundTripMs: number;
}

async function measure(image: Image, format: LayerFormat, variant: string, link: Link): Promise<Row> {
  const stack = await Stack.create('erofs-nbd-bench');
  const registry = await stack.startRegistry();
  const shaped = await startShapedLink(registry.address, link);
  try {
    const near = await registry.push(image, 'bench/python:latest');
    const far = near.replace(registry.address, shaped.address);
    const configuration = `version = 1\n[background]\ndownload = false\n[fetch]\n${VARIANTS[variant] ?? ''}`;
    const snapshotter = await stack.startSnapshotter({ configuration });
    const containerd = await stack.startContainerd({ snapshotters: [snapshotter.plugin] });
    const choice = ['--snapshotter', 'erofs-nbd'];
    const pull = (reference: string) => containerd.ctr('image', 'pull', '--plain-http', ...choice, reference);
    if (!format.startsWith('erofs')) {
      await pull(near);
      await containerd.ctr('image', 'rm', '--sync', near);
      while ((await snapshotter.devices())?.length !== 0) await delay(50);
      await rm(layout(snapshotter.plugin.root).cache, { recursive: true });
    }
    const before = trafficOf(registry, image);
    const begin = performance.now();
    await pull(far);
    const pulled = performance.now();
    let after = before;
    const { at } = await runUntilOutput(
      path.join(containerd.programs, 'ctr'),
      ['run', '--rm', ...choice, far, 'bench'],
      containerd.environment,
      () => {
        after = trafficOf(registry, image);
      },
    );
    return {
      format,
      variant,
      imageBytes: layerBytes(image),
      requests: after.requests - before.requests,
      bytes: after.bytes - before.bytes,
      pullSeconds: (pulled - begin) / 1000,
      outputSeconds: (at - begin) / 1000,
    };
  } finally {
    await shaped.stop();
    const troubles = await stack.remove();
    if (troubles.length > 0) console.error(`could not clean up: ${troubles.join('; ')}`);
  }
}

const mebibytes = (bytes: number): string => (bytes / 2 ** 20).toFixed(1);

export async function link(arguments_: string[]): Promise<void> {
  const { values } = parseArgs({
    args: arguments_,
    options: {
      mbit: { type: 'string', default: '50' },
      ms: { type: 'string', default: '20' },
      runs: { type: 'string', default: '1' },
    },
  });
  const shape = { bitsPerSecond: Number(values.mbit) * 1e6, roundTripMs: Number(values.ms) };
  console.log(
    `cold start over ${values.mbit} Mbit/s, ${values.ms} ms there and back; counted at the registry\n`,
  );
  console.log(
    'layers       fetching            run  requests  fetched MiB     %  KiB/request  pull s  to output s',
  );
  const rows: Row[] = [];
  for (const format of FORMATS) {
    const image = await buildDebianImage({ format });
    for (const variant of Object.keys(VARIANTS)) {
      for (let run = 1; run <= Number(values.runs); run++) {
        const row = await measure(image, format, variant, shape);
        rows.push(row);
        console.log(
          [
            row.format.padEnd(12),
            row.variant.padEnd(18),
            String(run).padStart(4),
            String(row.requests).padStart(9),
            mebibytes(row.bytes).padStart(12),
            ((100 * row.bytes) / row.imageBytes).toFixed(1).padStart(5),
            (row.bytes / row.requests / 1024).toFixed(0).padStart(12),
            row.pullSeconds.toFixed(2).padStart(7),
            row.outputSeconds.toFixed(2).padStart(12),
          ].join(' '),
        );
      }
    }
  }
  const most = rows
    .filter(({ variant }) => variant === AS_IT_COMES)
    .map(({ requests, bytes }) => (requests * BYTES_PER_REQUEST) / bytes);
  const highest = Math.max(...most);
  console.log(`\nrequests per 256 KiB fetched, as it comes: ${highest.toFixed(2)} at most; 1 are allowed`);
  console.log(JSON.stringify({ shape, rows, requestsPer256KiB: highest }));
  if (highest > 1) process.exitCode = 1;
}
