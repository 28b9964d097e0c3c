/**
 * Mounts by hand, as they are written down: a directory for each below the runtime directory, named by its mount point, which
 * is the root of a data plane of its own. It lies where a reboot empties it, as a reboot empties the kernel's mount table.
 */
import { createHash } from 'node:crypto';
import { readFile, readdir, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';

export const DEFAULT_RUNTIME = '/run/erofs-nbd-mount';
export const DEFAULT_CACHE = '/var/cache/erofs-nbd-mount';

const schema = z.strictObject({
  format: z.literal(1),
  /** As it was given: an image reference, or the file's absolute path. */
  source: z.string(),
  mountPoint: z.string(),
  /** `mounting` until all of it was there once. */
  state: z.enum(['mounting', 'mounted']),
  /** Of mount(2). */
  flags: z.int(),
  /** The lowest first. */
  layers: z.array(
    z.strictObject({
      /** Number in the root's database; its files are at `layers/<id>/fs`. */
      id: z.int(),
      /** Of the blob; of a local file what stands for it. */
      digest: z.string(),
      kind: z.enum(['erofs', 'tar', 'tar_gzip', 'other']),
      /**
       * Where the index is from: given with the mount, here already, published beside the image, made for the mount; a
       * native layer has none.
       */
      index: z.enum(['none', 'given', 'here', 'published', 'made']),
    }),
  ),
  /** A name and password were given; they are kept in memory alone. */
  login: z.boolean(),
});

export type MountRecord = z.output<typeof schema>;

export interface MountRoot {
  readonly directory: string;
  readonly record: string;
  /** Configuration of the data plane. */
  readonly configuration: string;
  /** What the data plane says. */
  readonly log: string;
  /** Which process watches over the data plane. */
  readonly watcher: string;
}

/** @param mountPoint absolute */
export function mountRoot(runtime: string, mountPoint: string): MountRoot {
  const name = createHash('sha256').update(mountPoint).digest('hex').slice(0, 16);
  return filesOf(path.join(runtime, name));
}

function filesOf(directory: string): MountRoot {
  return {
    directory,
    record: path.join(directory, 'mount.json'),
    configuration: path.join(directory, 'config.toml'),
    log: path.join(directory, 'blobserve.log'),
    watcher: path.join(directory, 'watcher.json'),
  };
}

/** @returns undefined when there is none */
export async function readMountRecord({ record }: MountRoot): Promise<MountRecord | undefined> {
  let text: string;
  try {
    text = await readFile(record, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw error;
  }
  return schema.parse(JSON.parse(text));
}

/** Whole or not at all. */
export async function writeMountRecord({ record }: MountRoot, content: MountRecord): Promise<void> {
  await writeFile(`${record}.new`, `${JSON.stringify(content)}\n`, { mode: 0o600 });
  await rename(`${record}.new`, record);
}

export interface RecordedMount {
  readonly root: MountRoot;
  readonly record: MountRecord;
}

/** All mounts by hand, by mount point. @throws {Error} EACCES, of the runtime directory: it is root's */
export async function recordedMounts(runtime: string): Promise<RecordedMount[]> {
  const names = await readdir(runtime).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw error;
  });
  const found: RecordedMount[] = [];
  for (const name of names.filter((one) => /^[0-9a-f]{16}$/.test(one))) {
    const root = filesOf(path.join(runtime, name));
    const record = await readMountRecord(root);
    if (record !== undefined) found.push({ root, record });
  }
  return found.sort((a, b) => (a.record.mountPoint < b.record.mountPoint ? -1 : 1));
}

/** The record goes first: without it, nothing is taken for a mount. Nothing may be mounted below any more. */
export async function removeMountRoot({ directory, record }: MountRoot): Promise<void> {
  await rm(record, { force: true });
  await rm(directory, { recursive: true, force: true });
}
