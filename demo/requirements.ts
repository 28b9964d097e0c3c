/**
 * What the demo needs of the machine that it cannot fetch by itself.
 */
import { constants } from 'node:fs';
import { access, readFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { execa } from 'execa';
import { checkout, installedProgram } from '../test/debian/packages.js';

/** Something is missing; the message says what and what to do, a line for each. */
export class MissingRequirements extends Error {
  override readonly name = 'MissingRequirements';

  constructor(missing: readonly string[]) {
    super(missing.join('\n'));
  }
}

async function exists(file: string): Promise<boolean> {
  return access(file, constants.R_OK).then(
    () => true,
    () => false,
  );
}

async function kernelHasFileSystem(name: string): Promise<boolean> {
  const known = async (): Promise<boolean> =>
    (await readFile('/proc/filesystems', 'utf8')).split('\n').some((line) => line.split('\t')[1] === name);
  if (await known()) return true;
  // In a module of its own, perhaps, which mount(8) would load too.
  await execa('modprobe', ['-q', name], { reject: false });
  return known();
}

/** True when the kernel's release is at least `major.minor`. */
function kernelIsAtLeast(major: number, minor: number): boolean {
  const [ownMajor = 0, ownMinor = 0] = os.release().split('.').map(Number);
  return ownMajor > major || (ownMajor === major && ownMinor >= minor);
}

/**
 * @returns the machine in a few words
 * @throws MissingRequirements naming everything that is missing, not only the first
 */
export async function checkRequirements(): Promise<string> {
  const missing: string[] = [];
  if (process.platform !== 'linux')
    throw new MissingRequirements(['Linux is needed: the kernel mounts the layers']);
  if (process.getuid?.() !== 0) {
    throw new MissingRequirements(['root is needed, to mount layers and run containers: sudo npm run demo']);
  }
  if (!(await exists(path.join(checkout, 'dist', 'snapshotter', 'main.js')))) {
    missing.push('the project is not built: npm run build');
  }
  for (const program of ['apt-get', 'dpkg-deb', 'mount', 'umount', 'tar', 'flock']) {
    if ((await installedProgram(program)) === undefined) {
      missing.push(`${program} is missing: the demo takes containerd and the image from Debian's packages`);
    }
  }
  for (const name of ['erofs', 'overlay']) {
    if (!(await kernelHasFileSystem(name))) {
      missing.push(
        `this kernel (${os.release()}) has no ${name}: it needs CONFIG_${name === 'erofs' ? 'EROFS_FS' : 'OVERLAY_FS'}`,
      );
    }
  }
  await execa('modprobe', ['-q', 'nbd'], { reject: false });
  const nbd = await exists('/sys/module/nbd');
  await execa('modprobe', ['-q', 'fuse'], { reject: false });
  const fuse = (await exists('/dev/fuse')) && kernelIsAtLeast(6, 12);
  if (!nbd && !fuse) {
    missing.push(
      `no way to hand layers to this kernel (${os.release()}): it needs the nbd module (modprobe nbd), ` +
        `or /dev/fuse and Linux 6.12 or newer; /dev/fuse is ${(await exists('/dev/fuse')) ? 'there' : 'missing'}`,
    );
  }
  if (missing.length > 0) throw new MissingRequirements(missing);
  const ways = [nbd ? 'nbd' : 'no nbd', fuse ? 'FUSE' : 'no FUSE'].join(', ');
  return `Linux ${os.release().split('-')[0]}, EROFS, ${ways}`;
}
