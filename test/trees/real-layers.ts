/**
 * Layers of Debian packages, each as a tar.gz in an image of its own, with what other programs make of its tar. Built once
 * and kept in the cache, since that takes a minute: everything in one directory belongs together, whatever versions the
 * packages have meanwhile.
 */
import { createHash } from 'node:crypto';
import { createReadStream, createWriteStream } from 'node:fs';
import {
  access,
  lstat,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  writeFile,
} from 'node:fs/promises';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import { createGzip } from 'node:zlib';
import { execa } from 'execa';
import { indexFiles, writeIndexRecord } from '../../blobserve/layer/index/layer-index.js';
import { LayerScan } from '../../blobserve/layer/index/layer-scan.js';
import { CacheReader } from '../../blobserve/readers/cache.js';
import { FileReader } from '../../blobserve/readers/file.js';
import { parseConfiguration } from '../../daemon/configuration.js';
import { layout } from '../../daemon/layout.js';
import { silentLogger } from '../../daemon/log.js';
import { cacheDirectory, fetchPackages } from '../debian/packages.js';
import { whyNoErofsMount } from '../erofs-mount.js';
import { fetchErofsUtils } from '../erofs-utils.js';
import type { ComposedLayer } from '../image/composed-image.js';
import { fileDigest } from '../image/layer-blob.js';
import { withMarks, type LayerTree } from '../image/layer-tree.js';
import { extractedTree, extractTar, mkfsTree } from './reference-trees.js';
import { addAttributes, changeBase } from './layer-changes.js';
import { readTree } from '../tree.js';
import { writeTree } from './tree-file.js';

/** Raised when the layers below change, so that caches do not serve the former ones. */
const REVISION = 1;

/** How a layer is made of packages. */
interface Recipe {
  readonly packages: readonly string[];
  /** What happens to the unpacked packages; below it the base, unpacked. Default: nothing. */
  readonly change?: (directory: string, base: string) => Promise<Omit<LayerTree, 'directory' | 'keepOwners'>>;
  /** The whole tree again below `srv/copy-N`, until the tar has so many bytes. */
  readonly tarBytes?: number;
  readonly gzipLevel: number;
  /** Bytes of the tar in each gzip member, for as many members as it takes. Default: one. */
  readonly memberBytes?: number;
}

const BASE = ['base-files', 'dash', 'tzdata', 'perl-base', 'grep', 'sed', 'diffutils'];

const RECIPES = {
  /** Set-user-ID programs, capabilities, attributes of every namespace, owners, devices, odd times. */
  attributes: {
    packages: ['iputils-ping', 'fping', 'mtr-tiny', 'libcap2-bin', 'mount', 'busybox-static'],
    change: addAttributes,
    gzipLevel: 9,
  },
  base: { packages: BASE, gzipLevel: 6 },
  /** Over `base`: hides, empties and replaces what is there. */
  whiteouts: { packages: ['mawk', 'netbase'], change: changeBase, gzipLevel: 6 },
  /** More than 100,000 regular files, and 60,000 symbolic links. */
  many: { packages: ['papirus-icon-theme', 'rust-src', 'breeze-icon-theme'], gzipLevel: 1 },
  /** More than 1 GiB, in several gzip members as pigz writes them. */
  large: {
    packages: ['python3-numpy', 'python3-pandas', 'python3-pandas-lib', 'libopenblas0-pthread'],
    tarBytes: 2 ** 30 + 2 ** 27,
    gzipLevel: 1,
    memberBytes: 2 ** 27,
  },
} as const satisfies Record<string, Recipe>;

export type RealLayerName = keyof typeof RECIPES;

/** `small`: a few megabytes each, for machines that emulate every instruction. */
export const LAYERS_OF = {
  small: ['attributes', 'base', 'whiteouts'],
  all: ['attributes', 'base', 'whiteouts', 'many', 'large'],
} as const satisfies Record<string, readonly RealLayerName[]>;

/**
 * The layers that `TREES` names: `small`, `all` and names of layers, with commas between. A layer that lies on another comes
 * with it.
 *
 * @throws {Error} there is no such layer
 */
export function chosenLayers(text: string): readonly RealLayerName[] {
  const names: string[] = text
    .split(',')
    .flatMap((name) => (name === 'small' || name === 'all' ? LAYERS_OF[name] : [name]));
  const unknown = names.find((name) => !(name in RECIPES));
  if (unknown !== undefined)
    throw new Error(`TREES=${text}: ${unknown} is neither small nor all nor a layer`);
  if (names.includes('whiteouts')) names.push('base');
  return LAYERS_OF.all.filter((name) => names.includes(name));
}

/** A layer and what it has to be equal to. */
export interface RealLayer {
  readonly name: RealLayerName;
  readonly composed: ComposedLayer;
  /** Files: the layer's blob, and its tar. */
  readonly blob: string;
  readonly tar: string;
  /** Directory that may have what a node has of the layer, see {@link prepareForNode}. */
  readonly node: string;
  /** Entries of the tree, the root included. */
  readonly entries: number;
  readonly tarBytes: number;
  /** Tree files (tree-file.ts): of GNU tar, of mkfs.erofs, and of GNU tar over the base where there is one. */
  readonly trees: { readonly tar: string; readonly mkfs: string; readonly merged: string | undefined };
}

/**
 * Builds a layer or takes it from the cache. Needs root, and the first time the network and a kernel that mounts EROFS from
 * files.
 *
 * @throws with what is missing
 */
export async function buildRealLayer(name: RealLayerName): Promise<RealLayer> {
  const recipe: Recipe = RECIPES[name];
  const system = await readFile('/etc/os-release', 'utf8');
  const key = createHash('sha256')
    .update(JSON.stringify([REVISION, name, recipe, system]))
    .digest('hex');
  const layers = path.join(cacheDirectory(), 'trees');
  const finished = path.join(layers, `${name}-${key.slice(0, 16)}`);
  const base = name === 'whiteouts' ? await buildRealLayer('base') : undefined;
  if (!(await isThere(path.join(finished, 'layer.json')))) {
    const whyNot = whyNoErofsMount();
    if (whyNot !== undefined) throw new Error(`the reference's tree cannot be read: ${whyNot}`);
    fetchErofsUtils();
    await mkdir(layers, { recursive: true });
    await removeAbandoned(layers);
    const scratch = await mkdtemp(path.join(layers, `building-${process.pid}-`));
    try {
      const layer = path.join(scratch, 'layer');
      await mkdir(layer);
      await build(recipe, scratch, layer, base?.tar);
      await rename(layer, finished).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') throw error;
      });
    } finally {
      await rm(scratch, { recursive: true, force: true });
    }
  }
  const text = await readFile(path.join(finished, 'layer.json'), 'utf8');
  const { digest, size, diffId, entries, tarBytes } = JSON.parse(text) as LayerFile;
  const at = (file: string): string => path.join(finished, file);
  const from = path.join(finished, 'layout');
  const mediaType = 'application/vnd.oci.image.layer.v1.tar+gzip';
  return {
    name,
    composed: { blob: { mediaType, digest, size }, diffId, from, linked: true },
    blob: path.join(from, 'blobs', ...digest.split(':')),
    tar: at('layer.tar'),
    node: at('node'),
    entries,
    tarBytes,
    trees: {
      tar: at('tar.jsonl'),
      mkfs: at('mkfs.jsonl'),
      merged: base === undefined ? undefined : at('merged.jsonl'),
    },
  };
}

/**
 * Makes what a node has of the layer that has had all of it, as this checkout makes it: its index, and its blob in the cache.
 * For machines that would take minutes to make it themselves; below `node` beside the layer, as below a root directory.
 */
export async function prepareForNode(real: RealLayer): Promise<void> {
  const { index, cache } = parseConfiguration('', 'default');
  const { digest, size } = real.composed.blob;
  const making = await mkdtemp(`${real.node}-`);
  try {
    const places = layout(making);
    const files = indexFiles(places.index, digest);
    const scan = await LayerScan.start({
      files,
      compression: 'gzip',
      spanSize: index.span_size,
      maxUncompressedBytes: index.max_uncompressed,
    });
    const blob = await CacheReader.open(await FileReader.open({ path: real.blob, size }), {
      dir: places.cache,
      digest,
      spanSize: cache.span_size,
      log: silentLogger,
    });
    const piece = Buffer.alloc(1 << 20);
    for (let at = 0; at < size; at += piece.length) {
      const part = piece.subarray(0, Math.min(piece.length, size - at));
      await blob.read(part, at);
      await scan.write(part);
    }
    const record = await scan.finish();
    await blob.settled();
    const complete = blob.allCached;
    await blob.close();
    if (record.digest !== digest || record.diffId !== real.composed.diffId || !complete) {
      throw new Error(`layer ${real.name} is not what it was when it was built: ${JSON.stringify(record)}`);
    }
    await writeIndexRecord(files, record);
    await rm(real.node, { recursive: true, force: true });
    await rename(making, real.node);
  } finally {
    await rm(making, { recursive: true, force: true });
  }
}

/** Content of `layer.json`, which is written last. */
interface LayerFile {
  readonly digest: string;
  readonly size: number;
  readonly diffId: string;
  readonly entries: number;
  readonly tarBytes: number;
}

async function build(
  recipe: Recipe,
  scratch: string,
  layer: string,
  baseTar: string | undefined,
): Promise<void> {
  const [root, below] = [path.join(scratch, 'root'), path.join(scratch, 'below')];
  await fetchPackages('system', root, recipe.packages);
  await rm(path.join(root, '.packages'));
  await mkdir(below);
  if (baseTar !== undefined) await extractTar(baseTar, below);
  const marks = (await recipe.change?.(root, below)) ?? {};
  const tree: LayerTree = { directory: root, keepOwners: true, ...marks };
  const tar = path.join(layer, 'layer.tar');
  await withMarks(tree, 'oci', () => writeTar(root, tar, recipe.tarBytes ?? 0));
  const { size: tarBytes } = await stat(tar);

  const blobs = path.join(layer, 'layout', 'blobs', 'sha256');
  await mkdir(blobs, { recursive: true });
  const compressed = path.join(blobs, 'layer.tar.gz');
  const memberBytes = recipe.memberBytes ?? tarBytes;
  for (let start = 0; start < tarBytes; start += memberBytes) {
    await pipeline(
      createReadStream(tar, { start, end: start + memberBytes - 1, highWaterMark: 1 << 20 }),
      createGzip({ level: recipe.gzipLevel, chunkSize: 1 << 20 }),
      createWriteStream(compressed, { flags: 'a' }),
    );
  }
  const [digest, diffId] = [await fileDigest(compressed), await fileDigest(tar)];
  const blob = path.join(blobs, digest.slice('sha256:'.length));
  await rename(compressed, blob);

  const extracted = await extractedTree(tar, scratch);
  await writeTree(path.join(layer, 'tar.jsonl'), extracted);
  await writeTree(path.join(layer, 'mkfs.jsonl'), await mkfsTree(tar, scratch));
  if (baseTar !== undefined) {
    const hidden = [...(tree.whiteouts ?? []), ...(tree.opaques ?? [])];
    for (const [name, { type }] of extracted) {
      // What is no directory any more, or has become one, replaces what was there, which GNU tar refuses.
      const old = await lstat(path.join(below, name)).catch(() => undefined);
      if (old !== undefined && old.isDirectory() !== (type === 'directory')) hidden.push(name);
    }
    for (const name of hidden) await rm(path.join(below, name), { recursive: true, force: true });
    await extractTar(tar, below, '--exclude=.wh.*');
    await writeTree(path.join(layer, 'merged.jsonl'), readTree(below));
  }
  const file: LayerFile = {
    digest,
    size: (await stat(blob)).size,
    diffId,
    entries: extracted.size,
    tarBytes,
  };
  await writeFile(path.join(layer, 'layer.json'), `${JSON.stringify(file)}\n`);
}

async function writeTar(root: string, tar: string, wantedBytes: number): Promise<void> {
  if (wantedBytes > 0) await mkdir(path.join(root, 'srv'));
  const options = [
    '--format=posix',
    '--pax-option=delete=atime,delete=ctime',
    '--sort=name',
    '--numeric-owner',
    '--xattrs',
    '--xattrs-include=*',
  ];
  await execa('tar', ['--create', `--file=${tar}`, `--directory=${root}`, ...options, '.']);
  for (let copy = 1; (await stat(tar)).size < wantedBytes; copy++) {
    // Also what hard links point to, but not what symbolic ones do.
    const renamed = `--transform=s,^\\.,./srv/copy-${copy},S`;
    await execa('tar', ['--append', `--file=${tar}`, `--directory=${root}`, ...options, renamed, '.']);
  }
}

/** Half-built layers of processes that were killed. */
async function removeAbandoned(layers: string): Promise<void> {
  for (const name of await readdir(layers)) {
    const pid = /^building-(\d+)-/.exec(name)?.[1];
    if (pid !== undefined && !(await isThere(`/proc/${pid}`))) {
      await rm(path.join(layers, name), { recursive: true, force: true });
    }
  }
}

function isThere(file: string): Promise<boolean> {
  return access(file).then(
    () => true,
    () => false,
  );
}
