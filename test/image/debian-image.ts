/**
 * A real image out of the system's own Debian suite, as a Dockerfile on `debian:…-slim` would give it: a base system,
 * Python, numerical libraries, and a small program with its data. About 200 MB without compression.
 */
import {
  appendFile,
  copyFile,
  mkdir,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises';
import path from 'node:path';
import { cacheDirectory, fetchPackages, listPackages } from '../debian/packages.js';
import { mergeUsr, type LayerTree } from './layer-tree.js';
import { buildImage, type Image, type ImageOptions } from './oci-layout.js';

const BASE =
  'base-files base-passwd usr-is-merged bash dash coreutils libc-bin findutils diffutils grep sed gzip tar mawk ' +
  'util-linux login passwd hostname perl-base tzdata ca-certificates openssl netbase procps';
const RUNTIME = 'python3 python3-minimal';
const LIBRARIES = 'python3-numpy python3-pandas libopenblas0-pthread';

/** The layers from the lowest up; each holds what the ones below it do not. */
const LAYERS = [
  { name: '1-base', packages: BASE.split(' ') },
  { name: '2-python', packages: RUNTIME.split(' ') },
  { name: '3-libraries', packages: LIBRARIES.split(' ') },
] as const;

/** Raised when what is made of the packages changes, so that caches do not serve the former layers. */
const REVISION = 2;

/** Rows of the data the program looks something up in: about 20 MB. */
const ROWS = 400_000;
const WANTED_ROW = 271_828;

const PROGRAM = `import json, platform, sqlite3, sys
import numpy

with open('/app/measurements.csv', 'rb') as data:
    data.seek(int(sys.argv[1]) if len(sys.argv) > 1 else ${WANTED_ROW} * 50)
    row = data.read(50).decode().split(',')
mean = numpy.array([float(value) for value in row[1:4]]).mean()
print(f'Hello from Python {platform.python_version()} and NumPy {numpy.__version__}: '
      f'the mean of row {int(row[0])} is {mean:.3f}', flush=True)
`;

/** What the image's program prints first starts with this. */
export const GREETING = 'Hello from Python ';

/** One row of exactly 50 bytes: its number and three values that follow from it. */
function row(number: number): string {
  const value = (factor: number): string => ((number * factor) % 100_000).toString().padStart(8, '0');
  const text = `${number.toString().padStart(8, '0')},${value(7919)}.125,${value(104_729)}.25,${value(1_299_709)}.5`;
  return `${text.padEnd(49)}\n`;
}

async function writeApplication(directory: string): Promise<void> {
  await mkdir(path.join(directory, 'app'), { recursive: true });
  await writeFile(path.join(directory, 'app', 'hello.py'), PROGRAM);
  const data = path.join(directory, 'app', 'measurements.csv');
  for (let from = 0; from < ROWS; from += 20_000) {
    const rows = Array.from({ length: Math.min(20_000, ROWS - from) }, (_, index) => row(from + index));
    await appendFile(data, rows.join(''));
  }
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

/** Debian chooses the BLAS by links that installation makes; the program must find it without them. */
async function finishLibraries(directory: string): Promise<void> {
  await mergeUsr(directory, false);
  const libraries = path.join(directory, 'usr', 'lib');
  for (const triplet of (await readdir(libraries)).filter((name) => name.endsWith('-linux-gnu'))) {
    const inside = path.join(libraries, triplet);
    const chosen = await readdir(path.join(inside, 'openblas-pthread'));
    for (const name of chosen.filter((entry) => /\.so\.\d+$/.test(entry))) {
      await symlink(path.join('openblas-pthread', name), path.join(inside, name));
    }
  }
}

/** The packages of one layer, as `name=version`. */
interface LayerPackages {
  readonly name: string;
  readonly packages: readonly string[];
}

/** Days for which a choice of versions is kept, so that building again does not ask apt. */
const CHOICE_DAYS = 7;

function choiceFile(): string {
  return path.join(cacheDirectory(), 'images', 'debian-python-packages.json');
}

async function chooseLayers(): Promise<readonly LayerPackages[]> {
  const file = choiceFile();
  const system = await readFile('/etc/os-release', 'utf8');
  const made = await stat(file).catch(() => undefined);
  if (made !== undefined && Date.now() - made.mtimeMs < CHOICE_DAYS * 86_400_000) {
    const choice = JSON.parse(await readFile(file, 'utf8')) as Record<string, unknown>;
    const same = choice['system'] === system && JSON.stringify(choice['wanted']) === JSON.stringify(LAYERS);
    if (same) return choice['layers'] as LayerPackages[];
  }

  const layers: LayerPackages[] = [];
  const below = new Set<string>();
  const wanted: string[] = [];
  for (const { name, packages } of LAYERS) {
    wanted.push(...packages);
    const closure = await listPackages('system', wanted);
    layers.push({ name, packages: closure.filter((entry) => !below.has(entry)) });
    for (const entry of closure) below.add(entry);
  }
  await mkdir(path.dirname(file), { recursive: true });
  const partial = `${file}.${process.pid}`;
  await writeFile(partial, JSON.stringify({ system, wanted: LAYERS, layers }));
  await rename(partial, file);
  return layers;
}

/** Builds the image or takes it from the cache; the first build downloads about 60 MB of packages. */
export async function buildDebianImage(
  options: ImageOptions = {},
  progress: (message: string) => void = () => undefined,
): Promise<Image> {
  progress('choosing packages');
  const layers = await chooseLayers();
  return buildImage(
    {
      name: 'debian-python',
      inputs: { REVISION, layers, PROGRAM, ROWS },
      configuration: {
        Env: ['PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin', 'OPENBLAS_NUM_THREADS=1'],
        Cmd: ['python3', '/app/hello.py'],
        WorkingDir: '/',
      },
      layers: async (scratch) => {
        const trees: LayerTree[] = [];
        for (const { name, packages } of layers) {
          progress(`layer ${name}: ${packages.length} Debian packages`);
          const directory = path.join(scratch, name);
          await fetchPackages('system', directory, packages).catch(async (error: unknown) => {
            // The mirror may have newer versions than were chosen some days ago: the next build chooses again.
            await rm(choiceFile(), { force: true });
            throw error;
          });
          await rm(path.join(directory, '.packages'));
          if (trees.length === 0) await finishBase(directory);
          else if (name === '3-libraries') await finishLibraries(directory);
          else await mergeUsr(directory, false);
          trees.push({ directory });
        }
        const application = path.join(scratch, '4-application');
        progress('layer 4-application: a program and its data');
        await writeApplication(application);
        trees.push({ directory: application });
        progress('writing the layers');
        return trees;
      },
    },
    options,
  );
}
