/**
 * `erofs-nbd index IMAGE`: makes the index of every tar and tar.gz layer of an image, and with `--push` publishes those of
 * its tar.gz layers beside the image, so that a node that has never seen it starts it lazily.
 */
import { homedir } from 'node:os';
import path from 'node:path';
import process from 'node:process';
import { Option, type Command } from 'commander';
import { LayerIndexer } from '../blobserve/layer-indexer.js';
import type { LayerIndexRecord } from '../blobserve/layer/index/layer-index.js';
import { isClassic, LayerLookup } from '../blobserve/layer-lookup.js';
import { openRegistryClient } from '../blobserve/open-registry-client.js';
import { publishIndex, type PublishedArtifact } from '../blobserve/published/publish.js';
import { RegistryRangeReader } from '../blobserve/readers/registry-range.js';
import { RetryReader } from '../blobserve/readers/retry.js';
import { formatReference, ImageReferenceError, parseReference } from '../blobserve/registry/reference.js';
import type { RegistryClient } from '../blobserve/registry/registry-client.js';
import { type Configuration, loadConfiguration } from '../daemon/configuration.js';
import { createLogger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { UsageError } from './failure.js';
import { interruptible, print } from './terminal.js';

interface IndexCommandLine {
  readonly config?: string;
  readonly out?: string;
  readonly push?: true;
  readonly platform: string;
  readonly quiet?: true;
  readonly json?: true;
}

type Source = control.LayerSource.$Properties;

/** Made again wherever it is missing; kept so that an interrupted run is gone on with. */
function defaultDirectory(): string {
  const caches = process.env['XDG_CACHE_HOME'];
  return path.join(caches ? caches : path.join(homedir(), '.cache'), 'erofs-nbd', 'index');
}

export function addIndexCommand(program: Command): void {
  program
    .command('index')
    .description('make the index of the layers of an image, and publish it beside the image')
    .argument('<image>', 'host[:port]/repository[:tag][@digest], or a short name of Docker Hub')
    .option('--config <file>', "the snapshotter's configuration file (default: /etc/erofs-nbd/config.toml)")
    .option('--out <directory>', `keep the files there, one set for a layer (default: ${defaultDirectory()})`)
    .option('--push', 'publish it in the image’s repository, as something that refers to the image')
    .addOption(
      new Option('--platform <os/architecture[/variant]>', 'of which platform').default('', "this machine's"),
    )
    .option('-q, --quiet', 'show no progress')
    .option('--json', 'print the result as JSON')
    .action(indexImage);
}

async function indexImage(image: string, options: IndexCommandLine): Promise<void> {
  const reference = parsed(image);
  const configuration = loadConfiguration(options.config);
  const log = createLogger('erofs-nbd index', 'warn', 'text');
  const registry = openRegistryClient(configuration, log);
  const directory = path.resolve(options.out ?? defaultDirectory());
  const indexer = new LayerIndexer({
    directory,
    workers: configuration.index.workers,
    spanSize: configuration.index.span_size,
    maxUncompressedBytes: configuration.index.max_uncompressed,
    maxEntries: configuration.index.max_entries,
    log,
  });
  const lookup = new LayerLookup(registry);
  const index = (layer: Source): Promise<LayerIndexRecord> => ensure(indexer, registry, configuration, layer);
  const onLayer = (digest: string, done: number, of: number): void => {
    if (options.quiet !== true && options.json !== true) {
      process.stderr.write(`layer ${done}/${of} ${digest.slice(0, 19)}: indexed\n`);
    }
  };
  try {
    await interruptible(async () => {
      if (options.push === true) {
        const files = (digest: string) => indexer.files(digest);
        const made = await publishIndex(reference, options.platform, {
          registry,
          lookup,
          index,
          files,
          onLayer,
        });
        await print(
          options.json === true ? `${JSON.stringify(made)}\n` : sentence(formatReference(reference), made),
        );
        return;
      }
      const layers = (await lookup.layers({ imageRef: formatReference(reference) }, options.platform)).filter(
        ({ kind }) => isClassic(kind),
      );
      const records: LayerIndexRecord[] = [];
      for (const layer of layers) {
        records.push(await index(layer));
        onLayer(layer.layerDigest ?? '', records.length, layers.length);
      }
      await print(
        options.json === true
          ? `${JSON.stringify({ directory, layers: records })}\n`
          : `${formatReference(reference)}: ${records.length} layers indexed in ${directory}\n`,
      );
    });
  } finally {
    await registry.close();
  }
}

function sentence(image: string, { digest, layers, of, bytes, pushedBytes }: PublishedArtifact): string {
  const sent = pushedBytes === bytes ? '' : `, of which ${bytes - pushedBytes} were there`;
  return `${image}: index ${digest} of ${layers} of ${of} layers, ${bytes} bytes${sent}\n`;
}

/** Reads the layer as it comes from the registry: what has been inflated once is in the journal of the index. */
function ensure(
  indexer: LayerIndexer,
  client: RegistryClient,
  { fetch }: Configuration,
  layer: Source,
): Promise<LayerIndexRecord> {
  const digest = layer.layerDigest ?? '';
  const size = layer.size ?? 0;
  const reference = parseReference(layer.imageRef ?? '');
  return indexer.ensure({
    digest,
    size,
    diffId: layer.diffId ?? '',
    open: () => {
      const range = new RegistryRangeReader({ client, reference, digest, size });
      const reader = new RetryReader(range, { readDeadlineMs: fetch.read_deadline });
      return Promise.resolve({ reader, forget: () => undefined });
    },
  });
}

function parsed(image: string) {
  try {
    return parseReference(image);
  } catch (error) {
    throw error instanceof ImageReferenceError ? new UsageError(error.message) : error;
  }
}
