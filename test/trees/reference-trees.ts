/** What other programs make of a layer's tar: the trees that ours must be equal to. */
import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { withErofsMount } from '../erofs-mount.js';
import { referenceTarIndex } from '../erofs-utils.js';
import { readTree, type Tree, type TreeEntry } from '../tree.js';

/** Extracts it as root does who wants every attribute, over what is there. */
export async function extractTar(tar: string, into: string, ...options: string[]): Promise<void> {
  await execa('tar', [
    '--xattrs',
    '--xattrs-include=*',
    '--numeric-owner',
    '--same-owner',
    // Or a directory that comes twice keeps the time at which the second was extracted.
    '--delay-directory-restore',
    ...options,
    '-xpf',
    tar,
    '-C',
    into,
  ]);
}

/**
 * The tree that GNU tar extracts, with OCI's marks as overlayfs has them.
 *
 * @param scratch an existing directory on a file system that takes owners, devices and attributes
 */
export async function extractedTree(tar: string, scratch: string): Promise<Tree> {
  const into = path.join(scratch, 'extracted');
  await mkdir(into);
  try {
    await extractTar(tar, into);
    return withOverlayMarks(readTree(into));
  } finally {
    await rm(into, { recursive: true, force: true });
  }
}

/** The tree of mkfs.erofs' index of the tar, as this machine's kernel shows it. */
export async function mkfsTree(tar: string, scratch: string): Promise<Tree> {
  const index = path.join(scratch, 'reference.erofs');
  referenceTarIndex(tar, index);
  try {
    return withErofsMount(index, (mountPoint) => readTree(mountPoint), `device=${tar}`);
  } finally {
    await rm(index);
  }
}

const OPAQUE = '.wh..wh..opq';
const WHITEOUT = '.wh.';

/**
 * OCI image specification, layer.md "Whiteouts", as mkfs.erofs --aufs does it: a whiteout becomes a 0/0 device without
 * permissions, with the owner and the times of its mark, in a directory that tells overlayfs to look for such; an opaque
 * directory gets the attribute that says so.
 */
function withOverlayMarks(tree: Tree): Tree {
  const marked = new Map<string, TreeEntry>();
  const [opaque, merged] = [new Set<string>(), new Set<string>()];
  for (const [name, entry] of tree) {
    const base = path.posix.basename(name);
    if (base === OPAQUE) opaque.add(path.posix.dirname(name));
    else if (base.startsWith(WHITEOUT)) {
      const hidden = path.posix.join(path.posix.dirname(name), base.slice(WHITEOUT.length));
      const device = { type: 'char', mode: 0, device: '0:0', size: 0, sha256: '', sameAs: hidden } as const;
      merged.add(path.posix.dirname(name));
      marked.set(hidden, { ...entry, ...device });
    } else marked.set(name, entry);
  }
  const setAttribute = (name: string, attribute: string, value: string): void => {
    const directory = marked.get(name);
    if (directory === undefined) throw new Error(`${name} has marks and is not in the tar`);
    const xattrs = { ...directory.xattrs, [attribute]: Buffer.from(value).toString('hex') };
    marked.set(name, { ...directory, xattrs });
  };
  for (const name of merged) setAttribute(name, 'trusted.overlay.origin', '');
  for (const name of opaque) setAttribute(name, 'trusted.overlay.opaque', 'y');
  return new Map([...marked].sort(([a], [b]) => (a < b ? -1 : 1)));
}
