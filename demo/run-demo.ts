/**
 * The demo's steps, from a bare machine to the first line of output and its price.
 */
import path from 'node:path';
import { control } from '../proto/messages.js';
import { containerdFromSid, program } from '../test/debian/packages.js';
import { buildDebianImage, GREETING } from '../test/image/debian-image.js';
import type { LayerFormat } from '../test/image/layer-blob.js';
import { layerBytes, type Image } from '../test/image/oci-layout.js';
import type { Containerd } from '../test/stack/containerd.js';
import type { Registry } from '../test/stack/registry.js';
import type { Snapshotter } from '../test/stack/snapshotter.js';
import type { Stack } from '../test/stack/stack.js';
import { runUntilOutput } from './first-output.js';
import { bold, dim, mebibytes, say, step, table } from './narration.js';
import { checkRequirements } from './requirements.js';

/** First part of the names of private directories, by which an abandoned one is known. */
export const PREFIX = 'erofs-nbd-demo';

export interface DemoChoices {
  readonly format: LayerFormat;
  readonly snapshotter: 'erofs-nbd' | 'overlayfs';
}

/** The keys of the last line. */
export interface DemoResult {
  readonly attach: string;
  /** Sum of the layers' blobs as the manifest has it. */
  readonly image_bytes: number;
  /** Body bytes of layer blobs that left the registry before the first output. */
  readonly fetched_bytes: number;
  /** What the snapshotter says it received, asked after the container ended. */
  readonly reported_bytes: number;
  readonly pull_seconds: number;
  /** From the start of the pull to the first byte the container printed. */
  readonly first_output_seconds: number;
  readonly output: string;
}

const FORMATS: Readonly<Record<LayerFormat, string>> = {
  erofs: 'native EROFS',
  'erofs-lz4hc': 'native EROFS, lz4hc',
  tar: 'tar',
  'tar+gzip': 'tar.gz',
};

const seconds = (from: number, to: number): number => Math.round(to - from) / 1000;

/**
 * @param open makes the private stack, for the caller to remove
 * @param signal checked between steps
 */
export async function runDemo(
  choices: DemoChoices,
  open: () => Promise<Stack>,
  signal: AbortSignal,
): Promise<DemoResult> {
  await step('this machine', async () => [undefined, await checkRequirements()]);
  signal.throwIfAborted();
  await step('programs from Debian', async ({ note }) => {
    note('containerd from sid: 25 MB the first time');
    await containerdFromSid();
    note('runc, docker-registry, erofs-utils');
    for (const name of ['runc', 'docker-registry', 'mkfs.erofs'] as const) await program(name);
    return [undefined, 'containerd, runc, docker-registry, erofs-utils'];
  });
  signal.throwIfAborted();
  const image = await step('image', async ({ note }) => {
    const built = await buildDebianImage({ format: choices.format }, note);
    return [
      built,
      `${built.layers.length} layers, ${mebibytes(layerBytes(built))}, ${FORMATS[choices.format]}`,
    ];
  });
  signal.throwIfAborted();
  const stack = await open();
  const { registry, reference } = await step('registry on loopback', async ({ note }) => {
    const started = await stack.startRegistry();
    note('pushing the image');
    const pushed = await started.push(image, 'demo/python:latest');
    return [{ registry: started, reference: pushed }, pushed];
  });
  signal.throwIfAborted();
  const services = await step('containerd, erofs-nbd', async () => {
    const snapshotter = choices.snapshotter === 'erofs-nbd' ? await stack.startSnapshotter() : undefined;
    signal.throwIfAborted();
    const containerd = await stack.startContainerd({ snapshotters: snapshotter ? [snapshotter.plugin] : [] });
    return [{ snapshotter, containerd }, `containerd ${containerd.version} in ${stack.directory}`];
  });
  signal.throwIfAborted();
  const result = await pullAndRun(choices, image, { ...services, registry, reference });
  tell(result, choices);
  return result;
}

interface Running {
  readonly registry: Registry;
  readonly containerd: Containerd;
  readonly snapshotter: Snapshotter | undefined;
  /** `127.0.0.1:port/demo/python:latest` */
  readonly reference: string;
}

async function pullAndRun(choices: DemoChoices, image: Image, running: Running): Promise<DemoResult> {
  const { registry, containerd, snapshotter, reference } = running;
  const layers = new Set(image.layers.map((layer) => layer.digest));
  const fetched = (): number =>
    [...registry.traffic()].reduce((sum, [digest, { bytes }]) => sum + (layers.has(digest) ? bytes : 0), 0);
  const choice = ['--snapshotter', choices.snapshotter];

  const begin = performance.now();
  const pulled = await step('ctr image pull', async () => {
    await containerd.ctr('image', 'pull', '--plain-http', ...choice, reference);
    return [performance.now(), `${mebibytes(fetched())} of its layers fetched`];
  });
  let fetchedBefore = 0;
  const { output, at } = await step('ctr run', async () => {
    const parameters = ['run', '--rm', ...choice, reference, `demo-${process.pid}`];
    const first = await runUntilOutput(
      path.join(containerd.programs, 'ctr'),
      parameters,
      containerd.environment,
      () => {
        fetchedBefore = fetched();
      },
    );
    return [first, `first output ${seconds(pulled, first.at).toFixed(1)} s after it began`];
  });
  if (!output.startsWith(GREETING))
    throw new Error(`the container printed something else than it should: ${output}`);

  const devices = (await snapshotter?.devices()) ?? [];
  const hello = await snapshotter?.hello();
  // Layers that are not native may be unpacked; native ones cannot be, so something must have served them.
  const native = choices.format.startsWith('erofs');
  if (native && devices.length === 0) throw new Error('the container ran, but no device serves its layers');
  return {
    attach:
      hello === undefined || devices.length === 0 ? 'none' : control.Backend[hello.backend].toLowerCase(),
    image_bytes: layerBytes(image),
    fetched_bytes: fetchedBefore,
    reported_bytes: devices.reduce((sum, device) => sum + (device.statistics?.fetchedBytes ?? 0), 0),
    pull_seconds: seconds(begin, pulled),
    first_output_seconds: seconds(begin, at),
    output,
  };
}

function tell(result: DemoResult, choices: DemoChoices): void {
  const part = ((100 * result.fetched_bytes) / result.image_bytes).toFixed(1);
  say();
  say(`    ${bold(result.output)}`);
  say();
  table([
    ['image', mebibytes(result.image_bytes)],
    ['fetched before the output', `${mebibytes(result.fetched_bytes)} (${part} %), counted at the registry`],
    ...(choices.snapshotter === 'overlayfs'
      ? []
      : ([
          ['fetched until its end', `${mebibytes(result.reported_bytes)}, by the snapshotter's own count`],
        ] as const)),
    ['pull', `${result.pull_seconds.toFixed(2)} s`],
    ['pull to first output', `${result.first_output_seconds.toFixed(2)} s`],
    ['attached by', result.attach],
  ]);
  say();
  say(`  ${dim('What to try next')}`);
  table([
    ['npm run demo -- --overlayfs', 'the same with containerd’s own snapshotter, to compare'],
    ['npm run demo -- --lz4', 'compressed native layers'],
    ['npm run demo -- --help', 'the other kinds of layers'],
    ['README.md', 'erofs-nbd beside your own containerd'],
  ]);
  say();
}
