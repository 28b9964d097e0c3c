/**
 * `erofs-nbd convert SOURCE DESTINATION`: an image whose layers become native EROFS layers, from a registry or an OCI layout to
 * either.
 */
import { stat } from 'node:fs/promises';
import { homedir, tmpdir } from 'node:os';
import path from 'node:path';
import process from 'node:process';
import { InvalidArgumentError, Option, type Command } from 'commander';
import { openRegistryClient } from '../blobserve/open-registry-client.js';
import { parsePlatform, type Platform } from '../blobserve/registry/platform.js';
import { type Configuration, loadConfiguration } from '../daemon/configuration.js';
import { createLogger } from '../daemon/log.js';
import { type Conversion, convertImage } from './convert/convert-image.js';
import { LayerConverter } from './convert/convert-layer.js';
import type { ImageDestination, ImageSource } from './convert/image-store.js';
import { LayoutDestination, LayoutSource } from './convert/layout-store.js';
import { checkMkfsOptions, findMkfs, mkfsOptions } from './convert/mkfs.js';
import { parsePlace, type Place } from './convert/place.js';
import { openConvertProgress } from './convert/progress.js';
import { RegistryDestination, RegistrySource } from './convert/registry-store.js';
import { Failure, UsageError } from './failure.js';
import { formatSize } from './quantities.js';
import { interruptible, print } from './terminal.js';

interface ConvertCommandLine {
  readonly config?: string;
  readonly platform: readonly Platform[];
  readonly compress: string;
  readonly layerType: string;
  readonly keepOriginal?: true;
  readonly mkfs: string;
  readonly tmpdir: string;
  readonly quiet?: true;
  readonly json?: true;
}

/** What native layers are called: which containerd takes which is in docs/convert.md. */
const LAYER_TYPES = ['application/vnd.oci.image.layer.v1.erofs', 'application/vnd.erofs.layer.v1'] as const;

/** What an earlier run made of which layer: kept so that an interrupted run is gone on with. */
function recordDirectory(): string {
  const caches = process.env['XDG_CACHE_HOME'];
  return path.join(caches ? caches : path.join(homedir(), '.cache'), 'erofs-nbd', 'convert');
}

export function addConvertCommand(program: Command): void {
  const place = 'host[:port]/repository[:tag][@digest], or oci:DIRECTORY[:TAG] for an OCI layout';
  program
    .command('convert')
    .description('make an image whose layers are native EROFS of one whose layers are tars')
    .argument('<source>', place)
    .argument('<destination>', place)
    .argument('[mkfs-options...]', 'behind "--": further options of mkfs.erofs, such as -Efragments,dedupe')
    .option('--config <file>', "the snapshotter's configuration file (default: /etc/erofs-nbd/config.toml)")
    .addOption(
      new Option(
        '--platform <os/architecture[/variant]>',
        'of an index, only this; may be given more than once',
      )
        .argParser((text: string, before: readonly Platform[]) => [...before, toPlatform(text)])
        .default([], 'all'),
    )
    .option('--compress <algorithm[,level=N]>', "as mkfs.erofs's -z takes it, or none", 'lz4hc')
    .addOption(
      new Option('--layer-type <type>', 'media type of the layers')
        .choices(LAYER_TYPES)
        .default(LAYER_TYPES[0]),
    )
    .option(
      '--keep-original',
      'make an index that has the original too, for nodes that cannot run EROFS layers',
    )
    .option('--mkfs <program>', 'mkfs.erofs to use', 'mkfs.erofs')
    .addOption(
      new Option(
        '--tmpdir <directory>',
        'for one layer at a time, and its files without compression',
      ).default(tmpdir(), '$TMPDIR or /tmp'),
    )
    .option('-q, --quiet', 'show no progress')
    .option('--json', 'print the result as JSON')
    .action(convert);
}

function toPlatform(text: string): Platform {
  try {
    return parsePlatform(text);
  } catch (error) {
    throw new InvalidArgumentError((error as Error).message);
  }
}

async function convert(
  sourceText: string,
  destinationText: string,
  further: readonly string[],
  options: ConvertCommandLine,
): Promise<void> {
  const from = parsePlace(sourceText);
  const to = parsePlace(destinationText);
  if (to.kind === 'registry' && to.reference.digest !== undefined)
    throw new UsageError(`${to.text}: what is made has a digest of its own; name the destination by a tag`);
  checkMkfsOptions(further);
  const algorithm = options.compress === 'none' ? undefined : options.compress;
  if (algorithm !== undefined && !/^[a-z0-9]+([,:][a-z0-9=,:]+)*$/.test(algorithm))
    throw new UsageError(`--compress ${JSON.stringify(algorithm)}: expected ALGORITHM[,level=N], or none`);
  const configuration = loadConfiguration(options.config);
  const mkfs = await findMkfs(options.mkfs);
  const temporary = path.resolve(options.tmpdir);
  const found = await stat(temporary).catch(() => undefined);
  if (found?.isDirectory() !== true) throw new Failure(`--tmpdir ${temporary}: is no directory`);
  const registry = openRegistryClient(configuration, createLogger('erofs-nbd convert', 'warn', 'text'));
  const source: ImageSource =
    from.kind === 'layout'
      ? new LayoutSource(from)
      : new RegistrySource(registry, from.reference, configuration.fetch.read_deadline);
  const destination: ImageDestination =
    to.kind === 'layout' ? new LayoutDestination(to) : new RegistryDestination(registry, to.reference);
  const progress = openConvertProgress(process.stderr, options.quiet === true || options.json === true);
  const layers = new LayerConverter({
    source,
    destination,
    mkfs,
    mkfsOptions: mkfsOptions(algorithm, further),
    mediaType: options.layerType,
    temporary,
    records: recordDirectory(),
    limits: limitsOf(configuration),
    onBytes: (bytes) => progress.read(bytes),
  });
  const startedAt = performance.now();
  try {
    const conversion = await interruptible((signal) =>
      convertImage({
        source,
        destination,
        layers,
        platforms: options.platform,
        keepOriginal: options.keepOriginal === true,
        signal,
        onPlan: (bytes, count) => progress.begin(bytes, count),
        onLayer: (layer) => progress.layer(layer),
      }),
    );
    progress.close();
    const seconds = Number(((performance.now() - startedAt) / 1000).toFixed(1));
    const result = { destination: to.text, ...conversion, mkfs: mkfs.version, seconds };
    await print(options.json === true ? `${JSON.stringify(result)}\n` : sentence(to, conversion, seconds));
  } finally {
    progress.close();
    await destination.close();
    await registry.close();
  }
}

function limitsOf({ index }: Configuration): { maxBytes: number; maxEntries: number } {
  return { maxBytes: index.max_uncompressed, maxEntries: index.max_entries };
}

function sentence({ text }: Place, { digest, images, leftOut }: Conversion, seconds: number): string {
  // Platforms share layers.
  const layers = [
    ...new Map(images.flatMap((image) => image.layers).map((layer) => [layer.source.digest, layer])).values(),
  ];
  const sum = (sizes: readonly number[]): string => formatSize(sizes.reduce((all, size) => all + size, 0));
  const lines = Object.entries(leftOut).map(([left, why]) => `left out: ${left} ${why}\n`);
  const made = layers.filter(({ outcome }) => outcome === 'converted').length;
  return (
    `${lines.join('')}${text} ${digest}: ${images.map(({ platform }) => platform).join(', ')}; ` +
    `${made} of ${layers.length} layers converted, ${sum(layers.map(({ source }) => source.size))} became ` +
    `${sum(layers.map(({ size }) => size))}, ${seconds} s\n`
  );
}
