/**
 * Images made of Debian packages, a layer for each group of them and one for a program: what the packages' own scripts would
 * do on installation is done only as far as running programs needs it.
 */
import { copyFile, mkdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { cacheDirectory, fetchPackages, listPackages } from '../debian/packages.js';
import { mergeUsr, type LayerTree } from './layer-tree.js';
import { buildImage, type Image, type ImageConfiguration, type ImageOptions } from './oci-layout.js';

/** What every Debian image has. */
export const BASE_LAYER = {
  name: '1-base',
  packages: (
    'base-files base-passwd usr-is-merged bash dash coreutils libc-bin findutils diffutils grep sed gzip tar mawk ' +
    'util-linux login passwd hostname perl-base tzdata ca-certificates openssl netbase procps'
  ).split(' '),
} as const;

/** The packages of one layer, by name, or as `name=version` once versions are chosen. */
export interface LayerPackages {
  readonly name: string;
  readonly packages: readonly string[];
}

export interface PackageImage {
  readonly name: string;
  /** From the lowest up, {@link BASE_LAYER} first; each holds, of these and their dependencies, what the ones below do not. */
  readonly layers: readonly LayerPackages[];
  /** What the image depends on besides its packages: raised or changed when what is made of them changes. */
  readonly inputs: (layers: readonly LayerPackages[]) => unknown;
  readonly configuration: ImageConfiguration;
  /** Changes to a layer's tree after its packages have been unpacked. */
  readonly finish?: (layer: string, directory: string) => Promise<void>;
  /** Name of the layer above all packages, and what puts the program there. */
  readonly application: { readonly name: string; readonly write: (directory: string) => Promise<void> };
}

/** What the packages' own scripts would do on installation, as far as running programs needs it. */
async function finishBase(directory: string): Promise<void> {
  await mergeUsr(directory, true);
  const master = path.join(directory, 'usr', 'share', 'base-passwd');
  await copyFile(path.join(master, 'passwd.master'), path.join(directory, 'etc', 'passwd'));
  await copyFile(path.join(master, 'group.master'), path.join(directory, 'etc', 'group'));
  for (const empty of ['dev', 'proc', 'sys', 'run', 'tmp']) {
    await mkdir(path.join(directory, empty), { recursive: true });
  }
}

/** Days for which a choice of versions is kept, so that building again does not ask apt. */
const CHOICE_DAYS = 7;

const choiceFile = ({ name }: PackageImage): string =>
  path.join(cacheDirectory(), 'images', `${name}-packages.json`);

async function chooseLayers(wanted: PackageImage): Promise<readonly LayerPackages[]> {
  const file = choiceFile(wanted);
  const system = await readFile('/etc/os-release', 'utf8');
  const made = await stat(file).catch(() => undefined);
  if (made !== undefined && Date.now() - made.mtimeMs < CHOICE_DAYS * 86_400_000) {
    const choice = JSON.parse(await readFile(file, 'utf8')) as Record<string, unknown>;
    const same =
      choice['system'] === system && JSON.stringify(choice['wanted']) === JSON.stringify(wanted.layers);
    if (same) return choice['layers'] as LayerPackages[];
  }

  const layers: LayerPackages[] = [];
  const below = new Set<string>();
  const all: string[] = [];
  for (const { name, packages } of wanted.layers) {
    all.push(...packages);
    const closure = await listPackages('system', all);
    layers.push({ name, packages: closure.filter((entry) => !below.has(entry)) });
    for (const entry of closure) below.add(entry);
  }
  await mkdir(path.dirname(file), { recursive: true });
  const partial = `${file}.${process.pid}`;
  await writeFile(partial, JSON.stringify({ system, wanted: wanted.layers, layers }));
  await rename(partial, file);
  return layers;
}

/** Builds the image or takes it from the cache; the first build downloads its packages. */
export async function buildPackageImage(
  wanted: PackageImage,
  options: ImageOptions = {},
  progress: (message: string) => void = () => undefined,
): Promise<Image> {
  progress('choosing packages');
  const layers = await chooseLayers(wanted);
  const { name, configuration, application } = wanted;
  return buildImage(
    {
      name,
      inputs: wanted.inputs(layers),
      configuration,
      layers: async (scratch) => {
        const trees: LayerTree[] = [];
        for (const layer of layers) {
          progress(`layer ${layer.name}: ${layer.packages.length} Debian packages`);
          const directory = path.join(scratch, layer.name);
          await fetchPackages('system', directory, layer.packages).catch(async (error: unknown) => {
            // The mirror may have newer versions than were chosen some days ago: the next build chooses again.
            await rm(choiceFile(wanted), { force: true });
            throw error;
          });
          await rm(path.join(directory, '.packages'));
          if (trees.length === 0) await finishBase(directory);
          else await mergeUsr(directory, false);
          await wanted.finish?.(layer.name, directory);
          trees.push({ directory });
        }
        const top = path.join(scratch, application.name);
        progress(`layer ${application.name}: a program and its data`);
        await application.write(top);
        trees.push({ directory: top });
        progress('writing the layers');
        return trees;
      },
    },
    options,
  );
}
