/**
 * Writes a tar.gz layer as one file: the bytes of its device, `[tarindex][tar]`, as containerd's EROFS differ lays out its
 * `layer.erofs` in tar-index mode, with zeros up to a whole sector where the tar lacks them. Reads what is on this node,
 * believes nothing of it, and compares all of it with its digests on the way.
 *
 * Plain synchronous calls that use a core and wait for the disk: for a thread of its own (materialise-thread.ts).
 *
 * The file has its name when it is whole and on the disk. Before, it is beside that as `<file>.partial`, locked by who
 * writes it: one that nobody has locked was left by a crash.
 */
import { createHash, type Hash } from 'node:crypto';
import {
  closeSync,
  fdatasyncSync,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  openSync,
  constants,
  readSync,
  renameSync,
  rmSync,
  statSync,
  writeSync,
} from 'node:fs';
import path from 'node:path';
import { GzipIndexer } from './layer/gzip/indexer.js';
import type { LayerIndexRecord } from './layer/index/layer-index.js';
import { lockAlone } from './linux/file-lock.js';
import { unfinishedPath } from './readers/cache-directory.js';

/** Read and written in one go. */
const PIECE = 1024 * 1024;
/** Bytes after which what was written is brought to the disk, so that no flush is long. */
const FLUSH = 32 * 1024 * 1024;

export interface MaterialiseRequest {
  /** Of the layer; its index is one made here, or confirmed. */
  readonly record: Pick<
    LayerIndexRecord,
    'digest' | 'diffId' | 'blobSize' | 'tarSize' | 'tarindexSize' | 'tarindexDigest' | 'deviceSize'
  >;
  /** Files: the blob, all of which is there, and the tarindex. */
  readonly blob: string;
  readonly tarindex: string;
  /** The file to make, or to look at. */
  readonly file: string;
}

/**
 * Makes the file.
 *
 * @param onStep told before every step that changes something: how many bytes are written, or what comes next
 * @throws {Error} the bytes are not what their digests say, or somebody else writes the file; nothing is left then
 * @throws the error of the system call that failed, the same
 */
export function materialise(
  request: MaterialiseRequest,
  onStep: (step: number | string) => void = noStep,
): void {
  const { record, blob, tarindex, file } = request;
  const partial = unfinishedPath(file);
  const output = openLocked(partial);
  try {
    ftruncateSync(output, 0);
    let written = 0;
    let flushed = 0;
    const write = (bytes: Buffer): void => {
      onStep(written);
      for (let at = 0; at < bytes.length;)
        at += writeSync(output, bytes, at, bytes.length - at, written + at);
      written += bytes.length;
      if (written - flushed < FLUSH) return;
      fdatasyncSync(output);
      flushed = written;
    };
    const index = createHash('sha256');
    readWhole(tarindex, record.tarindexSize, (piece) => {
      index.update(piece);
      write(piece);
    });
    expectDigest(tarindex, index, record.tarindexDigest);
    const inflation = new GzipIndexer({
      // No places to begin at are wanted.
      spanSize: Number.MAX_SAFE_INTEGER,
      maxUncompressedBytes: record.tarSize,
      onData: write,
    });
    try {
      readWhole(blob, record.blobSize, (piece) => inflation.write(piece));
      const { blobDigest, diffId } = inflation.finish();
      if (blobDigest !== record.digest || diffId !== record.diffId) {
        throw new Error(
          `${blob}: its digest is ${blobDigest} and it unpacks to ${diffId}; expected are ${record.digest} and ${record.diffId}`,
        );
      }
    } finally {
      inflation.close();
    }
    ftruncateSync(output, record.deviceSize);
    onStep('sync');
    fsyncSync(output);
    onStep('rename');
    renameSync(partial, file);
    onStep('sync the directory');
    syncDirectory(path.dirname(file));
  } catch (error) {
    rmSync(partial, { force: true });
    throw error;
  } finally {
    closeSync(output);
  }
}

/**
 * Reads all of a file that was made before.
 *
 * @throws {Error} it is not what it should be
 * @throws the error of the system call that failed
 */
export function checkMaterialised({ record, file }: MaterialiseRequest): void {
  const { size } = statSync(file);
  if (size !== record.deviceSize) {
    throw new Error(`${file}: it has ${size} bytes, ${record.deviceSize} were expected`);
  }
  const [index, tar] = [createHash('sha256'), createHash('sha256')];
  let at = 0;
  readWhole(file, record.tarindexSize + record.tarSize, (piece) => {
    const inIndex = Math.max(0, Math.min(piece.length, record.tarindexSize - at));
    index.update(piece.subarray(0, inIndex));
    tar.update(piece.subarray(inIndex));
    at += piece.length;
  });
  expectDigest(file, index, record.tarindexDigest);
  expectDigest(file, tar, record.diffId);
}

function noStep(): void {
  // Only tests want to know.
}

function expectDigest(file: string, hash: Hash, expected: string): void {
  const actual = `sha256:${hash.digest('hex')}`;
  if (actual !== expected) throw new Error(`${file}: ${actual} is not what was written, ${expected}`);
}

/** The descriptor of a file that nobody else writes. */
function openLocked(file: string): number {
  for (;;) {
    const descriptor = openSync(file, constants.O_RDWR | constants.O_CREAT, 0o600);
    let mine = false;
    try {
      if (!lockAlone(descriptor)) throw new Error(`${file}: another process writes it`);
      // Between open and lock, who swept may have removed it.
      const there = statSync(file, { throwIfNoEntry: false });
      mine = there?.ino === fstatSync(descriptor).ino;
      if (mine) return descriptor;
    } finally {
      if (!mine) closeSync(descriptor);
    }
  }
}

/** Gives the first `size` bytes of a file, in pieces that are valid until the callback returns. */
function readWhole(file: string, size: number, take: (piece: Buffer) => void): void {
  const descriptor = openSync(file, 'r');
  try {
    // Native code is told its address.
    const buffer = Buffer.from(new ArrayBuffer(Math.min(PIECE, Math.max(1, size))));
    for (let at = 0; at < size;) {
      const length = readSync(descriptor, buffer, 0, Math.min(buffer.length, size - at), at);
      if (length === 0) throw new Error(`${file}: it ends at ${at}, ${size} bytes were expected`);
      take(buffer.subarray(0, length));
      at += length;
    }
  } finally {
    closeSync(descriptor);
  }
}

function syncDirectory(directory: string): void {
  const descriptor = openSync(directory, 'r');
  try {
    fsyncSync(descriptor);
  } finally {
    closeSync(descriptor);
  }
}
