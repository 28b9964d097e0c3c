/**
 * Layer trees become an image in an OCI layout directory, kept in the cache: a second build of the same is a look-up.
 */
import { createHash } from 'node:crypto';
import { access, mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { cacheDirectory } from '../debian/packages.js';
import { blobPath, EROFS_LAYER, writeLayerBlob, type Blob, type LayerFormat } from './layer-blob.js';
import type { LayerTree } from './layer-tree.js';

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const CONFIG = 'application/vnd.oci.image.config.v1+json';
const INDEX = 'application/vnd.oci.image.index.v1+json';

/** What of an image's configuration matters to who runs it. */
export interface ImageConfiguration {
  readonly Env?: readonly string[];
  readonly Entrypoint?: readonly string[];
  readonly Cmd?: readonly string[];
  readonly WorkingDir?: string;
}

/** An image in an OCI layout directory. */
export interface Image {
  readonly layout: string;
  readonly manifest: Blob;
  readonly config: Blob;
  /** From the lowest up, as in the manifest. */
  readonly layers: readonly Blob[];
  readonly diffIds: readonly string[];
}

export interface ImageOptions {
  /** Default: `erofs`, native EROFS layers without compression. */
  readonly format?: LayerFormat;
  /** What native EROFS layers are called; default {@link EROFS_LAYER}. */
  readonly erofsMediaType?: string;
}

/** How the layers of an image are made: only called when the cache does not have it. */
export interface ImageRecipe {
  readonly name: string;
  /** All that the image depends on besides the options; the same inputs name the same image. */
  readonly inputs: unknown;
  readonly configuration: ImageConfiguration;
  /** Makes the trees below a scratch directory that is removed afterwards. */
  readonly layers: (scratch: string) => Promise<readonly LayerTree[]>;
}

/** What the bytes of layouts depend on in this folder's code: raised when they change. */
const REVISION = 1;

/** This machine as images name it. */
export function architecture(): string {
  return process.arch === 'x64' ? 'amd64' : process.arch;
}

/** Builds the image, or takes it from the cache; two processes may build the same one at once. */
export async function buildImage(recipe: ImageRecipe, options: ImageOptions = {}): Promise<Image> {
  const format = options.format ?? 'erofs';
  const erofsMediaType = options.erofsMediaType ?? EROFS_LAYER;
  const key = createHash('sha256')
    .update(
      JSON.stringify([REVISION, recipe.inputs, recipe.configuration, architecture(), format, erofsMediaType]),
    )
    .digest('hex');
  const images = path.join(cacheDirectory(), 'images');
  const finished = path.join(images, `${recipe.name}-${key.slice(0, 16)}`);
  const cached = await readLayout(finished);
  if (cached !== undefined) return cached;

  await mkdir(images, { recursive: true });
  await removeAbandoned(images);
  const scratch = await mkdtemp(path.join(images, `building-${process.pid}-`));
  try {
    const layout = path.join(scratch, 'layout');
    await mkdir(path.join(layout, 'blobs', 'sha256'), { recursive: true });
    const trees = await recipe.layers(path.join(scratch, 'trees'));
    await writeLayout(layout, trees, recipe.configuration, format, erofsMediaType);
    // The layout appears whole or not at all; who loses a race takes what the winner made.
    await rename(layout, finished).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') throw error;
    });
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
  const built = await readLayout(finished);
  if (built === undefined) throw new Error(`${finished} was built but is not a whole OCI layout`);
  return built;
}

/** Half-built images, hundreds of megabytes each, of processes that were killed. */
async function removeAbandoned(images: string): Promise<void> {
  for (const name of await readdir(images)) {
    const pid = /^building-(\d+)-/.exec(name)?.[1];
    if (pid === undefined) continue;
    const alive = await access(`/proc/${pid}`).then(
      () => true,
      () => false,
    );
    if (!alive) await rm(path.join(images, name), { recursive: true, force: true });
  }
}

async function writeLayout(
  layout: string,
  trees: readonly LayerTree[],
  configuration: ImageConfiguration,
  format: LayerFormat,
  erofsMediaType: string,
): Promise<void> {
  const layers: Blob[] = [];
  const diffIds: string[] = [];
  for (const tree of trees) {
    const { diffId, ...blob } = await writeLayerBlob(tree, format, layout, erofsMediaType);
    layers.push(blob);
    diffIds.push(diffId);
  }
  const config = await writeJsonBlob(layout, CONFIG, {
    created: '1970-01-01T00:00:00Z',
    architecture: architecture(),
    os: 'linux',
    config: configuration,
    rootfs: { type: 'layers', diff_ids: diffIds },
    history: trees.map((tree) => ({
      created: '1970-01-01T00:00:00Z',
      created_by: path.basename(tree.directory),
    })),
  });
  const manifest = await writeJsonBlob(layout, MANIFEST, {
    schemaVersion: 2,
    mediaType: MANIFEST,
    config,
    layers,
  });
  const platform = { architecture: architecture(), os: 'linux' };
  const index = { schemaVersion: 2, mediaType: INDEX, manifests: [{ ...manifest, platform }] };
  await writeFile(path.join(layout, 'oci-layout'), '{"imageLayoutVersion":"1.0.0"}');
  await writeFile(path.join(layout, 'index.json'), JSON.stringify(index));
}

async function writeJsonBlob(layout: string, mediaType: string, content: unknown): Promise<Blob> {
  const bytes = Buffer.from(JSON.stringify(content));
  const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
  await writeFile(blobPath(layout, digest), bytes);
  return { mediaType, digest, size: bytes.length };
}

/** The one image of a layout; undefined where there is no layout. */
export async function readLayout(layout: string): Promise<Image | undefined> {
  const json = async (file: string): Promise<unknown> => JSON.parse(await readFile(file, 'utf8')) as unknown;
  const index = (await json(path.join(layout, 'index.json')).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined;
    throw error;
  })) as { manifests: Blob[] } | undefined;
  const entry = index?.manifests[0];
  if (entry === undefined) return undefined;
  const { mediaType, digest, size } = entry;
  const { config, layers } = (await json(blobPath(layout, digest))) as { config: Blob; layers: Blob[] };
  const { rootfs } = (await json(blobPath(layout, config.digest))) as { rootfs: { diff_ids: string[] } };
  return { layout, manifest: { mediaType, digest, size }, config, layers, diffIds: rootfs.diff_ids };
}

/** Sum of the layers' blobs in bytes, as the manifest says. */
export function layerBytes(image: Image): number {
  return image.layers.reduce((sum, layer) => sum + layer.size, 0);
}
