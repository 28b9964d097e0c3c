/**
 * Small EROFS images by the dozen: one is made by mkfs.erofs, the others are the same with another identity, and so
 * another digest; or the same, damaged in a way that its own checksum does not show.
 */
import { randomBytes } from 'node:crypto';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { COMPAT, SUPER_BLOCK, SUPER_OFFSET } from '../../blobserve/layer/erofs/format.js';
import { superBlockChecksum } from '../../blobserve/layer/erofs/super-block.js';
import { program } from '../debian/packages.js';

export interface SmallErofs {
  readonly image: Buffer;
  /** What `/data` holds; nothing in it repeats. */
  readonly data: Buffer;
}

/**
 * @param scratch directory for the tree it is made of
 * @param size bytes of `/data`, the one file
 */
export async function smallErofs(scratch: string, size: number): Promise<SmallErofs> {
  const directory = await mkdtemp(path.join(scratch, 'small-erofs-'));
  try {
    const [tree, file] = [path.join(directory, 'tree'), path.join(directory, 'image')];
    const data = randomBytes(size);
    await mkdir(tree);
    await writeFile(path.join(tree, 'data'), data);
    await execa(await program('mkfs.erofs'), ['--quiet', '-d0', '-T0', file, tree], { stdin: 'ignore' });
    return { image: await readFile(file), data };
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

/** A copy that has been changed, with a checksum that is right again. */
export function changed(image: Buffer, change: (bytes: Buffer) => void): Buffer {
  const copy = Buffer.from(image);
  change(copy);
  const { featureCompat, blockSizeBits } = SUPER_BLOCK.read(copy, SUPER_OFFSET);
  if ((featureCompat & COMPAT.SB_CHKSUM) !== 0) {
    const checksum = superBlockChecksum(copy, 2 ** blockSizeBits);
    copy.writeUInt32LE(checksum, SUPER_OFFSET + SUPER_BLOCK.offsets.checksum);
  }
  return copy;
}

/** The same files under another digest. */
export function withIdentity(image: Buffer, identity: number): Buffer {
  return changed(image, (bytes) => bytes.writeUInt32BE(identity, SUPER_OFFSET + SUPER_BLOCK.offsets.uuid));
}

/** An image whose root directory is no inode: its super block is in order, and a kernel refuses it all the same. */
export function withBrokenRoot(image: Buffer): Buffer {
  return changed(image, (bytes) => {
    const { metaBlock, blockSizeBits, rootNidOrBlocksHigh: nid } = SUPER_BLOCK.read(bytes, SUPER_OFFSET);
    const inode = metaBlock * 2 ** blockSizeBits + nid * 32;
    bytes.fill(0xff, inode, inode + 32);
  });
}
