/**
 * What files a container of an image must see, found without any of our code: layers are mounted through loop devices, or
 * unpacked by tar, and read from there.
 */
import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { blobPath } from '../image/layer-blob.js';
import type { Image } from '../image/oci-layout.js';

/**
 * @param scratch a directory that is made, and removed again
 * @returns SHA-256 by absolute path of all regular files that are not empty
 */
export async function expectedFiles(image: Image, scratch: string): Promise<Map<string, string>> {
  const files = new Map<string, string>();
  for (const { digest, mediaType } of image.layers) {
    await mkdir(scratch, { recursive: true });
    const blob = blobPath(image.layout, digest);
    const isErofs = mediaType.includes('erofs');
    await (isErofs
      ? execa('mount', ['-t', 'erofs', '-o', 'loop,ro', blob, scratch])
      : execa('tar', ['-xf', blob, '-C', scratch]));
    try {
      const list = async (command: string): Promise<string[]> =>
        (await execa('bash', ['-c', command], { cwd: scratch, maxBuffer: 2 ** 28 })).stdout
          .split('\0')
          .filter(Boolean);
      // A link, a whiteout, an emptied file in place of a file below.
      for (const name of await list(`find . ! -type d -print0`)) files.delete(path.join('/', name));
      for (const line of await list(`find . -type f -size +0 -print0 | xargs -0 -r sha256sum -z`)) {
        files.set(path.join('/', line.slice(66)), line.slice(0, 64));
      }
    } finally {
      if (isErofs) await execa('umount', [scratch]);
      await rm(scratch, { recursive: true, force: true });
    }
  }
  return files;
}

/** Some of the files, spread over all of them. */
export function sample(files: ReadonlyMap<string, string>, count: number): Map<string, string> {
  const names = [...files.keys()].sort();
  const step = Math.max(1, names.length / count);
  const chosen = new Map<string, string>();
  for (let at = 0; at < names.length; at += step) {
    const name = names[Math.floor(at)] ?? '';
    chosen.set(name, files.get(name) ?? '');
  }
  return chosen;
}
