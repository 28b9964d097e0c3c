/**
 * Files that whoever mounts by hand has named for a layer: the layer itself, its tarindex, its zinfo. They are written down
 * below the root before the data plane is started, so that the next one finds them too.
 */
import { readFileSync } from 'node:fs';
import { rename, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';

const file = z.string().refine((value) => path.isAbsolute(value), 'expected an absolute path');

const schema = z.record(
  z.string(),
  z.strictObject({
    /** The layer's bytes, instead of a registry's. */
    blob: file.optional(),
    /** EROFS image of metadata whose one extra device is the tar: `mkfs.erofs --tar=i`, or one of ours. */
    tarindex: file.optional(),
    /** Checkpoints of the gzip stream; only with a tarindex. */
    zinfo: file.optional(),
  }),
);

/** By the digest that the layer is asked for by. */
export type GivenFiles = Readonly<z.output<typeof schema>>;
export type GivenLayer = GivenFiles[string];

/**
 * @returns undefined when there is no such file: nothing is mounted by hand from this root
 * @throws {Error} naming a file that cannot be read or is none of ours
 */
export function readGivenFiles(name: string): GivenFiles | undefined {
  let text: string;
  try {
    text = readFileSync(name, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  try {
    return schema.parse(JSON.parse(text));
  } catch (error) {
    throw new Error(`${name} does not say which files were given: ${String(error)}`, { cause: error });
  }
}

/** Whole or not at all. */
export async function writeGivenFiles(name: string, files: GivenFiles): Promise<void> {
  await writeFile(`${name}.new`, `${JSON.stringify(schema.parse(files))}\n`, { mode: 0o600 });
  await rename(`${name}.new`, name);
}
