/**
 * What a file is: by its content, never by its name.
 */
import { open, type FileHandle } from 'node:fs/promises';
import { SUPER_MAGIC, SUPER_OFFSET } from '../../blobserve/layer/erofs/format.js';
import { Failure } from '../failure.js';
import { inspectZinfo, inspectZwin, looksLikeZinfo, ZWIN_MAGIC } from './checkpoints.js';
import { inspectErofs } from './erofs-image.js';
import { inspectRecord } from './index-record.js';
import type { InspectedFile, Inspection } from './inspection.js';
import { inspectTar } from './tar-layer.js';

/** Where all that tells kinds apart is. */
const HEAD = SUPER_OFFSET + 4;

/** @throws {Error} naming what is wrong with the file, or that it is of no kind that is known */
export async function inspectFile(name: string, signal: AbortSignal): Promise<Inspection> {
  let handle: FileHandle;
  try {
    handle = await open(name, 'r');
  } catch (error) {
    throw new Failure(`${name}: cannot be opened (${(error as NodeJS.ErrnoException).code})`, undefined, {
      cause: error,
    });
  }
  try {
    const status = await handle.stat();
    if (!status.isFile()) throw new Failure(`${name}: is no file`);
    return await inspect(fileOf(name, handle, status.size), signal);
  } catch (error) {
    if (error instanceof Failure || signal.aborted) throw error;
    const reason = (error as Error).message;
    throw new Failure(reason.startsWith(name) ? reason : `${name}: ${reason}`, undefined, { cause: error });
  } finally {
    await handle.close();
  }
}

function fileOf(name: string, handle: FileHandle, size: number): InspectedFile {
  return {
    name,
    size,
    read: async (target, offset) => {
      for (let filled = 0; filled < target.length;) {
        const { bytesRead } = await handle.read(target, filled, target.length - filled, offset + filled);
        if (bytesRead === 0)
          throw new Failure(`${name}: ends at ${offset + filled}, wanted ${offset + target.length}`);
        filled += bytesRead;
      }
    },
  };
}

async function inspect(file: InspectedFile, signal: AbortSignal): Promise<Inspection> {
  const head = Buffer.alloc(Math.min(HEAD, file.size));
  await file.read(head, 0);
  if (head.subarray(0, ZWIN_MAGIC.length).equals(ZWIN_MAGIC)) return inspectZwin(file);
  if (head.length === HEAD && head.readUInt32LE(SUPER_OFFSET) === SUPER_MAGIC) return inspectErofs(file);
  if (head[0] === 0x1f && head[1] === 0x8b) return inspectTar(file, true, signal);
  // POSIX and GNU magic.
  if (head.toString('latin1', 257, 262) === 'ustar') return inspectTar(file, false, signal);
  if (looksLikeZinfo(head, file.size)) return inspectZinfo(file);
  const record = head[0] === 0x7b ? await inspectRecord(file) : undefined;
  if (record !== undefined) return record;
  throw new Failure(
    `${file.name}: neither an EROFS image, a tarindex, a tar, a tar.gz, checkpoints (zwin, zinfo) nor the record of an ` +
      `index: its ${file.size} bytes begin with ${head.toString('hex', 0, 8) || 'nothing'}`,
  );
}
