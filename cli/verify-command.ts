/**
 * `erofs-nbd verify IMAGE`: has the data plane hold what this node has of an image against every digest that is known, while
 * it serves.
 */
import process from 'node:process';
import type { Command } from 'commander';
import type { Platform } from '../blobserve/registry/platform.js';
import { formatReference } from '../blobserve/registry/reference.js';
import { control } from '../proto/messages.js';
import { withContainerdOptions, type ContainerdOptions } from './containerd-options.js';
import { EXIT } from './failure.js';
import { imageArgument } from './image-argument.js';
import { knownManifest } from './known-manifest.js';
import { askDataPlane, nodeConfiguration, withNodeOptions, type NodeOptions } from './node.js';
import { platformOption, platformText } from './platform-option.js';
import { openPrefetchProgress } from './prefetch-progress.js';
import { formatSize, printable } from './quantities.js';
import { LAYER_KINDS } from './status-report.js';
import { interruptible, print } from './terminal.js';
import { openVerifyProgress } from './verify-progress.js';

interface VerifyCommandLine extends NodeOptions, ContainerdOptions {
  readonly platform: Platform;
  readonly complete?: true;
  readonly dryRun?: true;
  readonly quiet?: true;
  readonly json?: true;
}

export function addVerifyCommand(program: Command): void {
  const command = program
    .command('verify')
    .description('hold what this node has of an image against every digest there is, while it is served')
    .argument('<image>', 'host[:port]/repository[:tag][@digest], or a short name of Docker Hub');
  withNodeOptions(withContainerdOptions(command))
    .addOption(platformOption())
    .option('--complete', 'fetch what is missing first, so that every layer is verified as a whole')
    .option('--dry-run', 'leave what is damaged as it is, instead of having it fetched again')
    .option('-q, --quiet', 'show no progress')
    .option('--json', 'print the result as JSON; sizes in bytes')
    .action(verify);
}

async function verify(image: string, options: VerifyCommandLine): Promise<void> {
  const configuration = nodeConfiguration(options);
  const name = formatReference(imageArgument(image));
  const address = options.address ?? configuration.containerd.address;
  const manifestDigest = await knownManifest(name, address, options);
  const platform = platformText(options.platform);
  const quiet = options.quiet === true || options.json === true;
  const done = await interruptible((signal) =>
    askDataPlane(configuration.root, async (client) => {
      if (options.complete === true) {
        const fetching = openPrefetchProgress(process.stderr, quiet);
        try {
          const request = { imageRef: name, manifestDigest, platform };
          await client.prefetch(request, ({ layers }) => fetching.show(layers), signal);
        } finally {
          fetching.close();
        }
      }
      const progress = openVerifyProgress(process.stderr, quiet);
      try {
        const request = { imageRef: name, manifestDigest, platform, dryRun: options.dryRun === true };
        return await client.verify(request, ({ layers }) => progress.show(layers), signal);
      } finally {
        progress.close();
      }
    }),
  );
  const layers = done.layers.map(layerResult);
  const wrong = layers.filter(({ problems }) => problems.length > 0).length;
  if (wrong > 0) process.exitCode = EXIT.failed;
  if (options.json === true) {
    await print(
      `${JSON.stringify({ image: name, digest: done.manifestDigest, right: wrong === 0, layers })}\n`,
    );
    return;
  }
  const sum = (of: (layer: LayerResult) => number): string =>
    formatSize(layers.reduce((all, layer) => all + of(layer), 0));
  const verdict = wrong === 0 ? 'nothing is wrong' : `${wrong} of ${layers.length} layers are damaged`;
  const checked = sum((layer) => layer.checkedBytes + layer.indexBytes + layer.unpackedBytes);
  await print(
    `${layers.map(sentence).join('')}${name} ${done.manifestDigest}: ${checked} read, ${verdict}\n`,
  );
}

type LayerResult = ReturnType<typeof layerResult>;

function layerResult(given: control.VerifiedLayer.$Properties) {
  const layer = control.VerifiedLayer.create(given);
  return {
    layer: layer.layerDigest,
    kind: LAYER_KINDS[layer.kind] ?? 'other',
    bytes: layer.size,
    /** False: it is not served lazily, and nothing of it is kept here. */
    served: layer.state === control.VerifyState.VERIFY_DONE,
    cachedBytes: layer.cachedBytes,
    checkedBytes: layer.checkedBytes,
    digestBytes: layer.digestBytes,
    whole: layer.whole,
    indexBytes: layer.indexBytes,
    unpackedBytes: layer.unpackedBytes,
    droppedBytes: layer.droppedBytes,
    problems: layer.problems.map((problem) => printable(problem, 500)),
  };
}

function sentence(result: LayerResult): string {
  const { layer, kind, bytes, served, cachedBytes, digestBytes, whole, indexBytes, unpackedBytes } = result;
  const name = `${layer.slice(0, 19)} ${kind}, ${formatSize(bytes)}: `;
  if (!served) return `${name}not served lazily, nothing of it is kept here\n`;
  const parts = [
    whole
      ? 'all of it is here and has its digest'
      : cachedBytes === 0
        ? 'nothing of it is here'
        : `${formatSize(cachedBytes)} of it are here, ${formatSize(digestBytes)} compared with digests`,
    ...(indexBytes > 0 ? [`its index of ${formatSize(indexBytes)} is whole`] : []),
    ...(unpackedBytes > 0 ? [`${formatSize(unpackedBytes)} unpacked`] : []),
  ];
  const problems = result.problems.map((problem) => `  WRONG: ${problem}\n`);
  if (result.droppedBytes > 0)
    problems.push(`  ${formatSize(result.droppedBytes)} are fetched again when they are read\n`);
  return `${name}${parts.join('; ')}\n${problems.join('')}`;
}
