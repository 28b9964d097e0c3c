/**
 * The demo's image, built from Debian packages: a base system, Python with numerical libraries, and a small program with
 * its data. About 200 MB without compression.
 */
import { appendFile, mkdir, readdir, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { Image, ImageOptions } from './oci-layout.js';
import { BASE_LAYER, buildPackageImage, type PackageImage } from './package-image.js';

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

/** Debian chooses the BLAS by links that installation makes; the program must find it without them. */
async function linkBlas(directory: string): Promise<void> {
  const libraries = path.join(directory, 'usr', 'lib');
  for (const triplet of (await readdir(libraries)).filter((name) => name.endsWith('-linux-gnu'))) {
    const inside = path.join(libraries, triplet);
    const chosen = await readdir(path.join(inside, 'openblas-pthread'));
    for (const name of chosen.filter((entry) => /\.so\.\d+$/.test(entry))) {
      await symlink(path.join('openblas-pthread', name), path.join(inside, name));
    }
  }
}

const DEBIAN_PYTHON: PackageImage = {
  name: 'debian-python',
  layers: [
    BASE_LAYER,
    { name: '2-python', packages: ['python3', 'python3-minimal'] },
    { name: '3-libraries', packages: ['python3-numpy', 'python3-pandas', 'libopenblas0-pthread'] },
  ],
  inputs: (layers) => ({ REVISION, layers, PROGRAM, ROWS }),
  configuration: {
    Env: ['PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin', 'OPENBLAS_NUM_THREADS=1'],
    Cmd: ['python3', '/app/hello.py'],
    WorkingDir: '/',
  },
  finish: async (layer, directory) => {
    if (layer === '3-libraries') await linkBlas(directory);
  },
  application: { name: '4-application', write: writeApplication },
};

/** Builds the image or takes it from the cache; the first build downloads about 60 MB of packages. */
export async function buildDebianImage(
  options: ImageOptions = {},
  progress: (message: string) => void = () => undefined,
): Promise<Image> {
  return buildPackageImage(DEBIAN_PYTHON, options, progress);
}
