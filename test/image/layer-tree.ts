/**
 * The directory tree that becomes one layer of an image, and the marks that say which entries of lower layers it hides.
 */
import { lstat, mkdir, readdir, rename, rmdir, rm, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { program } from '../debian/packages.js';

/** A layer before it is a blob. */
export interface LayerTree {
  /** What the layer adds, as files. */
  readonly directory: string;
  /** Paths relative to the root that the layer removes. */
  readonly whiteouts?: readonly string[];
  /** Directories of the layer, relative to the root, that hide everything lower layers have in them. */
  readonly opaques?: readonly string[];
  /** Keep the owners the files have; else everything is root's. */
  readonly keepOwners?: boolean;
}

/** `oci`: `.wh.` files, in tar layers. `overlay`: 0/0 devices and extended attributes, in native EROFS layers. */
export type WhiteoutStyle = 'oci' | 'overlay';

/**
 * Puts the layer's marks into its directory for as long as `work` runs.
 * OCI image specification, layer.md "Whiteouts"; Linux, Documentation/filesystems/overlayfs.rst "whiteouts and opaque".
 */
export async function withMarks<Result>(
  tree: LayerTree,
  style: WhiteoutStyle,
  work: () => Promise<Result>,
): Promise<Result> {
  const added: string[] = [];
  const opaques = (tree.opaques ?? []).map((entry) => path.join(tree.directory, entry));
  try {
    for (const entry of tree.whiteouts ?? []) {
      const target = path.join(tree.directory, entry);
      if (style === 'oci') {
        const mark = path.join(path.dirname(target), `.wh.${path.basename(target)}`);
        added.push(mark);
        await writeFile(mark, '', { mode: 0o644 });
      } else {
        added.push(target);
        await execa('mknod', ['-m', '000', target, 'c', '0', '0']);
      }
    }
    for (const directory of opaques) {
      if (style === 'oci') {
        const mark = path.join(directory, '.wh..wh..opq');
        added.push(mark);
        await writeFile(mark, '', { mode: 0o644 });
      } else {
        await execa(await program('setfattr'), ['-n', 'trusted.overlay.opaque', '-v', 'y', directory]);
      }
    }
    return await work();
  } finally {
    for (const mark of added) await rm(mark, { force: true });
    if (style === 'overlay') {
      for (const directory of opaques) {
        await execa(await program('setfattr'), ['-x', 'trusted.overlay.opaque', directory], {
          reject: false,
        });
      }
    }
  }
}

const TOP_LEVEL = ['bin', 'sbin', 'lib', 'lib64'];

/**
 * Moves /bin, /sbin, /lib and /lib64 into /usr, as Debian's merged /usr has it: packages of a system that was merged
 * long ago may still hold the old paths, and a real /lib in an upper layer would hide the link in a lower one.
 *
 * @param link make the links at the top (the base layer)
 */
export async function mergeUsr(root: string, link: boolean): Promise<void> {
  for (const name of TOP_LEVEL) {
    const old = path.join(root, name);
    const status = await lstat(old).catch(() => undefined);
    if (status?.isDirectory()) {
      await moveInto(old, path.join(root, 'usr', name));
    } else if (status !== undefined) {
      await rm(old);
    }
    if (link) {
      await mkdir(path.join(root, 'usr', name), { recursive: true });
      await symlink(`usr/${name}`, old);
    }
  }
}

async function moveInto(from: string, to: string): Promise<void> {
  await mkdir(to, { recursive: true });
  for (const entry of await readdir(from, { withFileTypes: true })) {
    const target = path.join(to, entry.name);
    const existing = await lstat(target).catch(() => undefined);
    if (entry.isDirectory() && existing?.isDirectory()) await moveInto(path.join(from, entry.name), target);
    else await rename(path.join(from, entry.name), target);
  }
  await rmdir(from);
}
