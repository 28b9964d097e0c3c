/**
 * What is in the registry when a node pulls: an image as its snapshotter wants it, with what was published of it. It is made
 * once and kept in the cache, in a repository of its own, so that no system finds what was published for another.
 */
import { createHash } from 'node:crypto';
import { access, mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { execa } from 'execa';
import { layout } from '../../../daemon/layout.js';
import { cacheDirectory, checkout, ctrRemoteProgram } from '../../debian/packages.js';
import { erofsUtilsProgram, fetchErofsUtils } from '../../erofs-utils.js';
import type { LayerFormat } from '../../image/layer-blob.js';
import type { Image } from '../../image/oci-layout.js';
import type { Containerd } from '../../stack/containerd.js';
import { convertToEstargz } from '../../stack/ctr-remote.js';
import type { Registry } from '../../stack/registry.js';
import { Soci } from '../../stack/soci.js';
import { Stack } from '../../stack/stack.js';
import type { ColdImage } from './images.js';

/** Directories of stacks start with it, of those that prepare too. */
export const PREFIX = 'erofs-nbd-cold';

/** Where contents are kept between runs. */
export const keptContents = (): string => path.join(cacheDirectory(), 'coldstart');

interface Making {
  /** Of the image as it was built: `127.0.0.1:port/repository:source`. */
  readonly source: string;
  /** What nodes will pull: `127.0.0.1:port/repository:latest`, which the image is too unless {@link Content.converted}. */
  readonly target: string;
  readonly image: ColdImage;
  /** Removed afterwards. */
  readonly scratch: Stack;
}

export interface Content {
  /** What is published, and with which settings. */
  readonly is: string;
  readonly format: LayerFormat;
  /** Made by this checkout's programs: made again when they change. */
  readonly ours?: true;
  /** Whether `make` pushes another image. */
  readonly converted?: true;
  /** Raised when what `make` does changes. */
  readonly revision?: number;
  readonly make?: (making: Making) => Promise<void>;
}

async function publisher({ scratch, source }: Making): Promise<Containerd> {
  const containerd = await scratch.startContainerd();
  await containerd.ctr('content', 'fetch', '--plain-http', source);
  return containerd;
}

/** `erofs-nbd index --push`. @param options more of its options */
async function pushIndex({ target, scratch }: Making, ...options: string[]): Promise<void> {
  const command = path.join(checkout, 'dist', 'cli', 'main.js');
  const out = path.join(scratch.directory, 'indexes');
  await execa(process.execPath, [command, 'index', '--push', '--json', '--out', out, ...options, target]);
}

/** `erofs-nbd convert`, with mkfs.erofs of Debian sid. @param options more of its options */
async function convert({ source, target, scratch }: Making, ...options: string[]): Promise<void> {
  const command = path.join(checkout, 'dist', 'cli', 'main.js');
  fetchErofsUtils();
  const mkfs = await erofsUtilsProgram('mkfs.erofs', path.join(scratch.directory, 'programs'));
  const places = ['--tmpdir', scratch.directory, '--mkfs', mkfs, source, target];
  await execa(process.execPath, [command, 'convert', '--json', ...places, ...options]);
}

/** The same with what a start of the image was recorded to read: it is pulled and run once, on a node of its own. */
async function pushIndexWithList(making: Making): Promise<void> {
  const { target, scratch } = making;
  const { root } = scratch.plugin();
  const configuration = `version = 1\nroot = ${JSON.stringify(root)}\n[prefetch]\nrecord_time = "8s"\n`;
  const snapshotter = await scratch.startSnapshotter({ configuration });
  const containerd = await scratch.startContainerd({ snapshotters: [snapshotter.plugin] });
  const choice = ['--snapshotter', 'erofs-nbd'];
  await containerd.ctr('image', 'pull', '--plain-http', ...choice, target);
  await containerd.ctr('run', '--rm', ...choice, target, 'recorded');
  const records = path.join(layout(root).prefetch, 'sha256');
  const deadline = Date.now() + 60_000;
  while (((await readdir(records).catch(() => [])) as string[]).every((name) => !name.endsWith('.json'))) {
    if (Date.now() > deadline) throw new Error(`nothing was recorded in ${records}`);
    await delay(200);
  }
  const file = path.join(scratch.directory, 'publish.toml');
  await writeFile(file, configuration);
  await pushIndex(making, '--config', file, '--with-prefetch');
}

/** What docs/convert.md recommends where kernels read it. */
const ZSTD = ['--compress', 'zstd,level=9', '--', '-C16384', '-Efragments'];

/** Native EROFS layers, made by our own program of the same tar.gz. @param options of `erofs-nbd convert` */
const native = (...options: string[]): Content => ({
  is: `native EROFS layers of \`${['erofs-nbd', 'convert', ...options].join(' ')}\``,
  format: 'tar+gzip',
  ...{ ours: true, converted: true },
  make: (making) => convert(making, ...options),
});

/** The same with a prefetch list. */
const nativeWithList = (...options: string[]): Content => ({
  ...native(...options),
  is: `${native(...options).is}, with the list of \`erofs-nbd index --push --with-prefetch\``,
  make: async (making) => {
    await convert(making, ...options);
    await pushIndexWithList(making);
  },
});

/** A new one is an entry here, and a system in systems.ts that names it. */
export const CONTENTS: Readonly<Record<string, Content>> = {
  'tar.gz': { is: 'tar.gz layers', format: 'tar+gzip' },
  native: native(),
  'native-list': nativeWithList(),
  'native-zstd': native(...ZSTD),
  'native-zstd-list': nativeWithList(...ZSTD),
  index: {
    is: 'tar.gz layers, with what `erofs-nbd index --push` makes',
    format: 'tar+gzip',
    ours: true,
    make: (making) => pushIndex(making),
  },
  'index-list': {
    is: 'tar.gz layers, with what `erofs-nbd index --push --with-prefetch` makes after one start of the image',
    format: 'tar+gzip',
    ours: true,
    make: pushIndexWithList,
  },
  soci: {
    is: 'tar.gz layers, with what `soci create` and `soci push` make (spans of 4 MiB; none for layers below 10 MiB)',
    format: 'tar+gzip',
    make: async (making) => {
      const containerd = await publisher({ ...making, source: making.target });
      const soci = await Soci.create(containerd, path.join(making.scratch.directory, 'soci'));
      await soci.indexWithDefaults(making.target);
      await soci.push(making.target);
    },
  },
  estargz: {
    is: 'what `ctr-remote images convert --estargz --oci` makes',
    format: 'tar+gzip',
    converted: true,
    make: async (making) => {
      await convertToEstargz(await publisher(making), making.source, making.target);
    },
  },
  'estargz-optimized': {
    is: 'what `ctr-remote images optimize --oci` makes, which runs the image and puts first what it reads',
    format: 'tar+gzip',
    converted: true,
    make: async (making) => {
      const containerd = await publisher(making);
      // It unpacks the image and runs it with containerd's default snapshotter, for 10 seconds.
      await containerd.ctr('image', 'pull', '--plain-http', making.source);
      const optimize = ['images', 'optimize', '--oci', making.source, making.target];
      await execa(await ctrRemoteProgram(), optimize, { env: containerd.environment, stdin: 'ignore' });
      await containerd.ctr('image', 'push', '--plain-http', making.target);
    },
  },
};

/** Of the compiled programs whose output contents hold. */
async function programsDigest(): Promise<string> {
  const hash = createHash('sha256');
  for (const part of ['blobserve', 'cli', 'daemon']) {
    const directory = path.join(checkout, 'dist', part);
    const names = (await readdir(directory, { recursive: true })).filter((name) => name.endsWith('.js'));
    for (const name of names.sort()) hash.update(name).update(await readFile(path.join(directory, name)));
  }
  return hash.digest('hex');
}

/**
 * Has the content in the registry.
 *
 * @param registry whose storage is kept below {@link keptContents}
 * @param track told of what has to be removed when the work is interrupted
 * @returns `repository:tag`
 */
export async function provide(
  name: string,
  image: ColdImage,
  registry: Registry,
  track: (scratch: Stack) => void,
  progress: (message: string) => void,
): Promise<string> {
  const content = CONTENTS[name];
  if (content === undefined) throw new Error(`no content ${name}`);
  const built: Image = await image.build({ format: content.format }, progress);
  const inputs = [
    built.manifest.digest,
    name,
    content.is,
    content.revision ?? 1,
    content.ours && (await programsDigest()),
  ];
  const key = createHash('sha256').update(JSON.stringify(inputs)).digest('hex').slice(0, 12);
  const repository = `bench/${image.name}-${name.replace('.', '')}-${key}`;
  const made = path.join(keptContents(), 'made', path.basename(repository));
  const wanted = `${repository}:latest`;
  if (
    await access(made).then(
      () => true,
      () => false,
    )
  )
    return wanted;

  progress(`publishing ${content.is}`);
  const scratch = await Stack.create(`${PREFIX}-publisher`);
  track(scratch);
  try {
    const source = await registry.push(built, `${repository}:source`);
    const target = content.converted
      ? source.replace(/:source$/, ':latest')
      : await registry.push(built, wanted);
    await content.make?.({ source, target, image, scratch });
    await mkdir(path.dirname(made), { recursive: true });
    await writeFile(made, '');
  } finally {
    await scratch.remove();
  }
  return wanted;
}

/** Forgets all contents; for `--fresh`. */
export async function forgetContents(): Promise<void> {
  await rm(keptContents(), { recursive: true, force: true });
}
