/**
 * `erofs-nbd index IMAGE|FILE`: makes the index of every tar and tar.gz layer of an image, or of one in a file, and with
 * `--push` publishes those of an image's tar.gz layers beside it, so that a node that has never seen it starts it lazily.
 */
import { stat } from 'node:fs/promises';
import { homedir } from 'node:os';
import path from 'node:path';
import process from 'node:process';
import { Option, type Command } from 'commander';
import { LayerIndexer } from '../blobserve/layer-indexer.js';
import { digestFile, type LayerIndexRecord } from '../blobserve/layer/index/layer-index.js';
import { isClassic, LayerLookup } from '../blobserve/layer-lookup.js';
import { openRegistryClient } from '../blobserve/open-registry-client.js';
import { publishIndex, type PublishedArtifact } from '../blobserve/published/publish.js';
import { listFor, type PrefetchList } from '../blobserve/prefetch-list.js';
import { PrefetchRecords } from '../blobserve/prefetch-records.js';
import { FileReader } from '../blobserve/readers/file.js';
import { RegistryRangeReader } from '../blobserve/readers/registry-range.js';
import { RetryReader } from '../blobserve/readers/retry.js';
import { formatReference, parseReference } from '../blobserve/registry/reference.js';
import type { RegistryClient } from '../blobserve/registry/registry-client.js';
import { type Configuration, loadConfiguration } from '../daemon/configuration.js';
import { layout } from '../daemon/layout.js';
import { createLogger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { Failure, UsageError } from './failure.js';
import { imageArgument } from './image-argument.js';
import { type IndexProgress, openIndexProgress } from './index-progress.js';
import { interruptible, print } from './terminal.js';

interface IndexCommandLine {
  readonly config?: string;
  readonly out?: string;
  readonly push?: true;
  readonly attachByAnnotation?: string;
  readonly withPrefetch?: true;
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
    .description('make the index of the layers of an image or of a file, and publish it beside the image')
    .argument(
      '<image-or-file>',
      'host[:port]/repository[:tag][@digest], or a short name of Docker Hub; a file begins with "/", "./" or "../"',
    )
    .option('--config <file>', "the snapshotter's configuration file (default: /etc/erofs-nbd/config.toml)")
    .option('--out <directory>', `keep the files there, one set for a layer (default: ${defaultDirectory()})`)
    .option('--push', 'publish it in the image’s repository, as something that refers to the image')
    .option(
      '--attach-by-annotation <tag>',
      'with --push: in place of referring to the image, have a copy of it name the index; the copy gets this tag',
    )
    .option(
      '--with-prefetch',
      'with --push: also publish what starts of the image on this node were recorded to read first',
    )
    .addOption(
      new Option('--platform <os/architecture[/variant]>', 'of which platform').default('', "this machine's"),
    )
    .option('-q, --quiet', 'show no progress')
    .option('--json', 'print the result as JSON')
    .action((subject: string, options: IndexCommandLine) => {
      checkChoices(options);
      return /^\.{0,2}\//.test(subject) ? indexFile(subject, options) : indexImage(subject, options);
    });
}

/** @throws {UsageError} */
function checkChoices({ push, attachByAnnotation: tag, withPrefetch }: IndexCommandLine): void {
  if (withPrefetch === true && push !== true) throw new UsageError('--with-prefetch goes with --push');
  if (tag === undefined) return;
  if (push !== true) throw new UsageError('--attach-by-annotation goes with --push');
  if (!/^\w[\w.-]{0,127}$/.test(tag)) {
    throw new UsageError(
      `--attach-by-annotation: ${JSON.stringify(tag)} is no tag, as in host/repository:tag`,
    );
  }
}

function openIndexer(directory: string, configuration: Configuration): LayerIndexer {
  return new LayerIndexer({
    directory,
    workers: configuration.index.workers,
    spanSize: configuration.index.span_size,
    maxUncompressedBytes: configuration.index.max_uncompressed,
    maxEntries: configuration.index.max_entries,
    log: createLogger('erofs-nbd index', 'warn', 'text'),
  });
}

async function indexFile(file: string, options: IndexCommandLine): Promise<void> {
  if (options.push === true) throw new UsageError('--push: a file has no repository; name an image');
  const status = await stat(file).catch((error: NodeJS.ErrnoException) => {
    throw new Failure(`${file}: cannot be opened (${error.code ?? error.message})`);
  });
  if (!status.isFile()) throw new Failure(`${file}: is no file`);
  const directory = path.resolve(options.out ?? defaultDirectory());
  const indexer = openIndexer(directory, loadConfiguration(options.config));
  const progress = openIndexProgress(process.stderr, options.quiet === true || options.json === true);
  try {
    const record = await interruptible(async (signal) => {
      const { digest, size } = await digestFile(file);
      signal.throwIfAborted();
      const open = async () => ({
        reader: progress.metered(await FileReader.open({ path: file, size }), signal),
        forget: () => undefined,
      });
      return indexer.ensure({ digest, size, diffId: '', open });
    });
    progress.close();
    const { tarindex } = indexer.files(record.digest);
    await print(
      options.json === true
        ? `${JSON.stringify({ directory, layers: [record] })}\n`
        : `${file}: indexed, ${tarindex.replace(/\.erofs$/, '.*')}\n`,
    );
  } finally {
    progress.close();
  }
}

async function indexImage(image: string, options: IndexCommandLine): Promise<void> {
  const reference = imageArgument(image);
  const configuration = loadConfiguration(options.config);
  const log = createLogger('erofs-nbd index', 'warn', 'text');
  const registry = openRegistryClient(configuration, log);
  const directory = path.resolve(options.out ?? defaultDirectory());
  const indexer = openIndexer(directory, configuration);
  const lookup = new LayerLookup(registry);
  const progress = openIndexProgress(process.stderr, options.quiet === true || options.json === true);
  const onLayer = (digest: string, done: number, of: number): void => progress.done(digest, done, of);
  try {
    await interruptible(async (signal) => {
      const index = (layer: Source): Promise<LayerIndexRecord> =>
        ensure(indexer, registry, configuration, layer, progress, signal);
      if (options.push === true) {
        const files = (digest: string) => indexer.files(digest);
        const made = await publishIndex(reference, options.platform, {
          registry,
          lookup,
          index,
          files,
          onLayer,
          ...(options.attachByAnnotation !== undefined && { attachTo: options.attachByAnnotation }),
          ...(options.withPrefetch === true && {
            prefetch: (manifestDigest, layers) =>
              recordedList(configuration, formatReference(reference), manifestDigest, layers),
          }),
        });
        progress.close();
        await print(
          options.json === true
            ? `${JSON.stringify(made)}\n`
            : sentence(formatReference(reference), made, options.attachByAnnotation),
        );
        return;
      }
      const layers = (await lookup.layers({ imageRef: formatReference(reference) }, options.platform)).filter(
        ({ kind }) => isClassic(kind),
      );
      const records: LayerIndexRecord[] = [];
      for (const layer of layers) {
        signal.throwIfAborted();
        records.push(await index(layer));
        onLayer(layer.layerDigest ?? '', records.length, layers.length);
      }
      progress.close();
      await print(
        options.json === true
          ? `${JSON.stringify({ directory, layers: records })}\n`
          : `${formatReference(reference)}: ${records.length} layers indexed in ${directory}\n`,
      );
    });
  } finally {
    progress.close();
    await registry.close();
  }
}

/** @throws {Failure} this node knows nothing of the image's starts */
async function recordedList(
  { root, prefetch }: Configuration,
  image: string,
  manifestDigest: string,
  layers: readonly Source[],
): Promise<PrefetchList> {
  const { prefetch: directory } = layout(root);
  const { max_bytes: maxBytes, max_spans: maxSpans } = prefetch;
  let list: PrefetchList | undefined;
  try {
    list = await new PrefetchRecords(directory, { maxSpans }).list(manifestDigest);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new Failure(`${directory}: what starts of ${image} read cannot be read: ${reason}`, undefined, {
      cause: error,
    });
  }
  const sizes = new Map(layers.map(({ layerDigest, size }) => [layerDigest ?? '', size ?? 0]));
  const usable = list === undefined ? [] : listFor(list, sizes, { maxBytes, maxSpans }).list;
  if (usable.length > 0) return usable;
  throw new Failure(
    `${image}, manifest ${manifestDigest}: no start of it has been recorded in ${directory}. Pull it with erofs-nbd on this node, ` +
      `run a container of it for longer than prefetch.record_time (${prefetch.record_time / 1000} s), and try again; ` +
      'prefetch.record must not be false',
  );
}

function sentence(
  image: string,
  { digest, layers, of, bytes, pushedBytes, attached, prefetchSpans }: PublishedArtifact,
  tag: string | undefined,
): string {
  const sent = pushedBytes === bytes ? '' : `, of which ${bytes - pushedBytes} were there`;
  const copy = attached === undefined ? '' : `; the copy that names it is ${tag ?? ''}, ${attached}`;
  const list = prefetchSpans === undefined ? '' : `, with a prefetch list of ${prefetchSpans} spans`;
  return `${image}: index ${digest} of ${layers} of ${of} layers${list}, ${bytes} bytes${sent}${copy}\n`;
}

/** Reads the layer as it comes from the registry: what has been inflated once is in the journal of the index. */
function ensure(
  indexer: LayerIndexer,
  client: RegistryClient,
  { fetch }: Configuration,
  layer: Source,
  progress: IndexProgress,
  signal: AbortSignal,
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
      return Promise.resolve({ reader: progress.metered(reader, signal), forget: () => undefined });
    },
  });
}
