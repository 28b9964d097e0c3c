/**
 * `erofs-nbd prefetch IMAGE`: has the data plane bring an image's layers into this node's cache ahead of use.
 *
 * Nothing is pulled into containerd; when it knows the image, the manifest that it has is the one that is meant, wherever the
 * tag points now.
 */
import process from 'node:process';
import type { Command } from 'commander';
import type { Platform } from '../blobserve/registry/platform.js';
import { formatReference } from '../blobserve/registry/reference.js';
import { control } from '../proto/messages.js';
import { withContainerdOptions, type ContainerdOptions } from './containerd-options.js';
import { imageArgument } from './image-argument.js';
import { knownManifest } from './known-manifest.js';
import { askDataPlane, nodeConfiguration, withNodeOptions, type NodeOptions } from './node.js';
import { platformOption, platformText } from './platform-option.js';
import { openPrefetchProgress } from './prefetch-progress.js';
import { formatSize } from './quantities.js';
import { LAYER_KINDS } from './status-report.js';
import { interruptible, print } from './terminal.js';

interface PrefetchCommandLine extends NodeOptions, ContainerdOptions {
  readonly platform: Platform;
  readonly quiet?: true;
  readonly json?: true;
}

export function addPrefetchCommand(program: Command): void {
  const command = program
    .command('prefetch')
    .description('bring all bytes of an image into the cache of this node, behind what containers wait for')
    .argument('<image>', 'host[:port]/repository[:tag][@digest], or a short name of Docker Hub');
  withNodeOptions(withContainerdOptions(command))
    .addOption(platformOption())
    .option('-q, --quiet', 'show no progress')
    .option('--json', 'print the result as JSON; sizes in bytes')
    .action(prefetch);
}

async function prefetch(image: string, options: PrefetchCommandLine): Promise<void> {
  const configuration = nodeConfiguration(options);
  const name = formatReference(imageArgument(image));
  const manifestDigest = await knownManifest(
    name,
    options.address ?? configuration.containerd.address,
    options,
  );
  const progress = openPrefetchProgress(process.stderr, options.quiet === true || options.json === true);
  const startedAt = performance.now();
  try {
    const done = await interruptible((signal) =>
      askDataPlane(configuration.root, (client) =>
        client.prefetch(
          { imageRef: name, manifestDigest, platform: platformText(options.platform) },
          (told) => progress.show(told.layers),
          signal,
        ),
      ),
    );
    progress.close();
    const seconds = Number(((performance.now() - startedAt) / 1000).toFixed(1));
    const layers = done.layers.map(layerResult);
    const fetchedBytes = layers.reduce((sum, layer) => sum + layer.fetchedBytes, 0);
    if (options.json === true) {
      const document = { image: name, digest: done.manifestDigest, layers, fetchedBytes, seconds };
      await print(`${JSON.stringify(document)}\n`);
      return;
    }
    const here = layers.filter(({ here }) => here);
    const size = here.reduce((sum, { bytes }) => sum + bytes, 0);
    await print(
      `${name}: ${here.length} of ${layers.length} layers are here, ${formatSize(size)}; ` +
        `${formatSize(fetchedBytes)} fetched, ${seconds} s\n`,
    );
  } finally {
    progress.close();
  }
}

function layerResult(given: control.PrefetchedLayer.$Properties) {
  const { layerDigest, kind, size, fetchedBytes, state } = control.PrefetchedLayer.create(given);
  return {
    layer: layerDigest,
    kind: LAYER_KINDS[kind] ?? 'other',
    bytes: size,
    fetchedBytes,
    /** False: it is not served lazily, and containerd downloads it when the image is pulled. */
    here: state === control.PrefetchState.PREFETCH_DONE,
  };
}
