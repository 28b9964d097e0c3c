/**
 * The demo's steps, from a bare machine to the first line of output and its price.
 */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { execa } from 'execa';
import { layout } from '../daemon/layout.js';
import { control } from '../proto/messages.js';
import { checkout, containerdFrom, program } from '../test/debian/packages.js';
import { buildDebianImage, GREETING } from '../test/image/debian-image.js';
import type { LayerFormat } from '../test/image/layer-blob.js';
import { layerBytes, type Image } from '../test/image/oci-layout.js';
import type { Containerd } from '../test/stack/containerd.js';
import type { Registry } from '../test/stack/registry.js';
import type { Snapshotter } from '../test/stack/snapshotter.js';
import type { Stack } from '../test/stack/stack.js';
import { PREFIX } from './prefix.js';
import { runUntilOutput } from './first-output.js';
import { publish, type PublishedKind } from './publisher.js';
import { bold, dim, mebibytes, say, step, table } from './narration.js';
import { checkRequirements } from './requirements.js';

export { PREFIX };

export interface DemoChoices {
  readonly format: LayerFormat;
  readonly snapshotter: 'erofs-nbd' | 'overlayfs';
  /** The image's index was published from another machine; this one has never seen the image. */
  readonly freshNode: boolean;
  /** By what it is lazy there. */
  readonly published: PublishedKind;
  /** Where a page goes that draws what the last container read. */
  readonly report?: string;
}

/** How a pull and a run of the image went. */
interface Start {
  /** Body bytes of layer blobs that left the registry for the pull. */
  readonly pullBytes: number;
  /** The same until the first output. */
  readonly bytes: number;
  /** Body bytes of all other blobs until then: the image's configuration, a published index. */
  readonly otherBytes: number;
  readonly pullSeconds: number;
  /** From the start of the pull to the first byte the container printed. */
  readonly outputSeconds: number;
  readonly output: string;
}

/** The keys of the last line. Without a prefix: of the start that is the demo's subject, the last one. */
export interface DemoResult {
  readonly attach: string;
  /** Sum of the layers' blobs as the manifest has it. */
  readonly image_bytes: number;
  /** Body bytes of layer blobs that left the registry before the first output. */
  readonly fetched_bytes: number;
  /** What the snapshotter says it received for this start, asked after the container ended. */
  readonly reported_bytes: number;
  readonly pull_seconds: number;
  /** From the start of the pull to the first byte the container printed. */
  readonly first_output_seconds: number;
  readonly output: string;
  /** A fresh node: body bytes of the published index, with the image's configuration. */
  readonly index_bytes?: number;
  /** tar and tar.gz: the first pull on this node, which indexes the layers while they come in … */
  readonly first_pull_fetched_bytes?: number;
  readonly first_pull_seconds?: number;
  /** … and the second, after the image was removed. */
  readonly second_pull_fetched_bytes?: number;
  readonly second_pull_seconds?: number;
}

const FORMATS: Readonly<Record<LayerFormat, string>> = {
  erofs: 'native EROFS',
  'erofs-lz4hc': 'native EROFS, lz4hc',
  tar: 'ordinary tar layers',
  'tar+gzip': 'ordinary tar.gz layers',
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
    await containerdFrom('sid');
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
  const published = choices.freshNode
    ? await publish(choices.published, image, reference, path.join(stack.directory, 'publisher'))
    : { image, reference };
  const node = new Node(choices, published.image, { ...services, registry, reference: published.reference });
  signal.throwIfAborted();
  const classic =
    choices.snapshotter === 'erofs-nbd' && !choices.format.startsWith('erofs') && !choices.freshNode;
  const starts = classic ? await threeStarts(node, signal) : [await node.start('')];
  if (choices.report !== undefined) await report(node, choices.report);
  const result = await summary(node, starts);
  tell(result, choices);
  return result;
}

/** First pull; second pull, from the cache; a start with the cache gone and the index kept. */
async function threeStarts(node: Node, signal: AbortSignal): Promise<Start[]> {
  say();
  say(`  ${dim('1. A first pull: its layers are indexed while they come in.')}`);
  const first = await node.start('-1');
  signal.throwIfAborted();
  say();
  say(`  ${dim('2. The image is removed and pulled again: its blobs are in the cache.')}`);
  await node.removeImage();
  const second = await node.start('-2');
  if (second.bytes > 0) throw new Error(`${second.bytes} bytes of layers were fetched that are in the cache`);
  signal.throwIfAborted();
  say();
  say(`  ${dim('3. Removed again, and the cache emptied; the small indexes stay: a lazy start.')}`);
  await node.removeImage();
  await node.dropCache();
  return [first, second, await node.start('-3')];
}

/** Draws what the container has read. */
async function report({ running }: Node, file: string): Promise<void> {
  const { containerd, snapshotter, reference } = running;
  await step('erofs-nbd report', async () => {
    const command = path.join(checkout, 'dist', 'cli', 'main.js');
    const choice = ['report', '--root', snapshotter?.plugin.root ?? '', '-o', path.resolve(file), reference];
    const { stdout } = await execa(process.execPath, [command, ...choice], { env: containerd.environment });
    return [undefined, stdout];
  });
}

interface Running {
  readonly registry: Registry;
  readonly containerd: Containerd;
  readonly snapshotter: Snapshotter | undefined;
  /** `127.0.0.1:port/demo/python:latest` */
  readonly reference: string;
}

/** Milliseconds for devices of a removed image to go. */
const DETACH_TIMEOUT = 20_000;

/** A machine that pulls the image and runs it. */
class Node {
  readonly #layers: ReadonlySet<string>;

  constructor(
    readonly choices: DemoChoices,
    readonly image: Image,
    readonly running: Running,
  ) {
    this.#layers = new Set(image.layers.map((layer) => layer.digest));
  }

  /** @param suffix of the container's name */
  async start(suffix: string): Promise<Start> {
    const { containerd, reference } = this.running;
    const choice = ['--snapshotter', this.choices.snapshotter];
    const before = this.#fetched();
    const othersBefore = this.#fetchedOthers();
    const begin = performance.now();
    const pulled = await step('ctr image pull', async () => {
      await containerd.ctr('image', 'pull', '--plain-http', ...choice, reference);
      return [performance.now(), `${mebibytes(this.#fetched() - before)} of its layers fetched`];
    });
    const pullBytes = this.#fetched() - before;
    let [bytes, otherBytes] = [0, 0];
    const { output, at } = await step('ctr run', async () => {
      const first = await runUntilOutput(
        path.join(containerd.programs, 'ctr'),
        ['run', '--rm', ...choice, reference, `demo-${process.pid}${suffix}`],
        containerd.environment,
        () => {
          bytes = this.#fetched() - before;
          otherBytes = this.#fetchedOthers() - othersBefore;
        },
      );
      const part = ((100 * bytes) / layerBytes(this.image)).toFixed(1);
      const after = seconds(pulled, first.at).toFixed(1);
      return [first, `first output after ${after} s, ${part} % of the image`];
    });
    if (!output.startsWith(GREETING))
      throw new Error(`the container printed something else than it should: ${output}`);
    return {
      pullBytes,
      bytes,
      otherBytes,
      pullSeconds: seconds(begin, pulled),
      outputSeconds: seconds(begin, at),
      output,
    };
  }

  /** Removes the image, and waits until nothing of it is attached. */
  async removeImage(): Promise<void> {
    const { containerd, snapshotter, reference } = this.running;
    await containerd.ctr('image', 'rm', '--sync', reference);
    const deadline = Date.now() + DETACH_TIMEOUT;
    while ((await snapshotter?.devices())?.length !== 0) {
      if (Date.now() > deadline) throw new Error('the image was removed, and its layers are still attached');
      await delay(20);
    }
  }

  async dropCache(): Promise<void> {
    const { snapshotter } = this.running;
    if (snapshotter) await rm(layout(snapshotter.plugin.root).cache, { recursive: true });
  }

  #fetched(): number {
    return this.#sum((digest) => this.#layers.has(digest));
  }

  #fetchedOthers(): number {
    return this.#sum((digest) => !this.#layers.has(digest));
  }

  #sum(counted: (digest: string) => boolean): number {
    const counts = [...this.running.registry.traffic()].filter(([digest]) => counted(digest));
    return counts.reduce((sum, [, { bytes }]) => sum + bytes, 0);
  }
}

async function summary({ choices, image, running }: Node, starts: readonly Start[]): Promise<DemoResult> {
  const devices = (await running.snapshotter?.devices()) ?? [];
  const hello = await running.snapshotter?.hello();
  if (choices.snapshotter === 'erofs-nbd' && devices.length === 0)
    throw new Error('the container ran, but no device serves its layers');
  const last = starts.at(-1);
  if (last === undefined) throw new Error('nothing was started');
  const [first, second] = starts.length === 3 ? starts : [];
  return {
    attach:
      hello === undefined || devices.length === 0 ? 'none' : control.Backend[hello.backend].toLowerCase(),
    image_bytes: layerBytes(image),
    fetched_bytes: last.bytes,
    reported_bytes: devices.reduce((sum, device) => sum + (device.statistics?.fetchedBytes ?? 0), 0),
    pull_seconds: last.pullSeconds,
    first_output_seconds: last.outputSeconds,
    ...(choices.freshNode && { index_bytes: last.otherBytes }),
    ...(first && { first_pull_fetched_bytes: first.pullBytes, first_pull_seconds: first.pullSeconds }),
    ...(second && { second_pull_fetched_bytes: second.pullBytes, second_pull_seconds: second.pullSeconds }),
    output: last.output,
  };
}

function tell(result: DemoResult, choices: DemoChoices): void {
  const part = ((100 * result.fetched_bytes) / result.image_bytes).toFixed(1);
  const { first_pull_seconds: first, second_pull_seconds: second } = result;
  say();
  say(`    ${bold(result.output)}`);
  say();
  table([
    ['image', `${mebibytes(result.image_bytes)}, ${FORMATS[choices.format]}`],
    ['fetched before the output', `${mebibytes(result.fetched_bytes)} (${part} %), counted at the registry`],
    ...(result.index_bytes === undefined
      ? []
      : ([['its index, from the registry', mebibytes(result.index_bytes)]] as const)),
    ...(choices.snapshotter === 'overlayfs'
      ? []
      : ([
          ['fetched until its end', `${mebibytes(result.reported_bytes)}, by the snapshotter's own count`],
        ] as const)),
    [
      'pull',
      `${result.pull_seconds.toFixed(2)} s${first === undefined ? '' : ` (first ${first.toFixed(2)} s, second ${(second ?? 0).toFixed(2)} s)`}`,
    ],
    ['pull to first output', `${result.first_output_seconds.toFixed(2)} s`],
    ['attached by', result.attach],
  ]);
  say();
  say(`  ${dim('What to try next')}`);
  table([
    ['npm run demo -- --overlayfs', 'the same with containerd’s own snapshotter, to compare'],
    ['npm run demo -- --fresh-node', 'a node that has never seen the image, whose index was published'],
    ['npm run demo -- --native', 'native EROFS layers, which need no index'],
    ['npm run demo -- --report demo.html', 'what the container read, and when, as a page'],
    ['README.md', 'erofs-nbd beside your own containerd'],
  ]);
  say();
}
