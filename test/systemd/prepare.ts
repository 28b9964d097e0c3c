/**
 * What the test under systemd needs and the test machine cannot make, having no network: a Debian root with systemd, Node.js
 * and containerd, and two versions of the package of this checkout.
 */
import { mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { cacheDirectory, checkout } from '../debian/packages.js';

/** Debian's, which the package is for. */
export const SUITES = ['trixie', 'bookworm'] as const;

/** What is tried, and where. */
export interface Flavour {
  readonly suite: (typeof SUITES)[number];
  /** The package that brings its own Node.js along, where there is no other one. */
  readonly withNode: boolean;
}

const PACKAGES = 'init-system-helpers,systemd,containerd,kmod,procps,ca-certificates';
/** A version that is higher than every other. */
export const NEXT_VERSION = '99.0.0';

export interface Prepared {
  /** The root, not to be written to. */
  readonly root: string;
  readonly package: string;
  /** The same under {@link NEXT_VERSION}. */
  readonly nextPackage: string;
}

/** Kept in the cache; the first call downloads about 100 MB. */
export async function debianRoot({ suite, withNode }: Flavour): Promise<string> {
  const packages = withNode ? PACKAGES : `nodejs,${PACKAGES}`;
  const name = `systemd-${suite}${withNode ? '-without-node' : ''}`;
  const root = path.join(cacheDirectory(), 'roots', name);
  const [said, wanted] = [
    await readFile(`${root}.packages`, 'utf8').catch(() => ''),
    `${suite} ${packages}\n`,
  ];
  if (said === wanted) return root;
  const partial = `${root}.${process.pid}`;
  const mirror = process.env['EROFS_NBD_DEBIAN_MIRROR'] ?? 'http://deb.debian.org/debian';
  try {
    await mkdir(path.dirname(root), { recursive: true });
    // The certificates of this machine's proxies are of no use in there.
    const env = {
      NODE_EXTRA_CA_CERTS: undefined,
      NODE_OPTIONS: undefined,
      DEBIAN_FRONTEND: 'noninteractive',
    };
    await execa('debootstrap', ['--variant=minbase', `--include=${packages}`, suite, partial, mirror], {
      ...{ stdin: 'ignore', env },
    });
    await rm(path.join(partial, 'var/cache/apt'), { recursive: true });
    await rm(root, { recursive: true, force: true });
    await rename(partial, root);
    await writeFile(`${root}.packages`, wanted);
  } finally {
    await rm(partial, { recursive: true, force: true });
  }
  return root;
}

/** @param directory an existing one, where the packages are put */
export async function prepare(directory: string, flavour: Flavour): Promise<Prepared> {
  const root = await debianRoot(flavour);
  const build = path.join(checkout, 'packaging', 'build.sh');
  const kind = flavour.withNode ? ['--with-node'] : [];
  const made = await execa('bash', [build, ...kind, directory], {
    ...{ stdin: 'ignore', cwd: checkout, env: { COMPRESSION: 'gzip' } },
  });
  const first = made.stdout.trim().split('\n').at(-1) ?? '';
  const [unpacked, nextPackage] = [path.join(directory, 'next'), path.join(directory, 'next.deb')];
  await rm(unpacked, { recursive: true, force: true });
  await execa('dpkg-deb', ['-R', first, unpacked]);
  // Another content, too: a daemon finds its version there, and hands its devices to one that has another.
  const json = path.join(unpacked, 'usr/lib/erofs-nbd/package.json');
  const said = JSON.parse(await readFile(json, 'utf8')) as Record<string, unknown>;
  await writeFile(json, JSON.stringify({ ...said, version: NEXT_VERSION }));
  const control = path.join(unpacked, 'DEBIAN/control');
  const text = await readFile(control, 'utf8');
  await writeFile(control, text.replace(/^Version: .*$/m, `Version: ${NEXT_VERSION}`));
  await execa('dpkg-deb', ['--root-owner-group', '-Zgzip', '-z1', '--build', unpacked, nextPackage]);
  await rm(unpacked, { recursive: true });
  return { root, package: first, nextPackage };
}
