/** Makes eStargz layers piece by piece, as stargz-snapshotter's writer does, and ones that no tool would write. */
import { createHash } from 'node:crypto';
import { gzipSync } from 'node:zlib';
import { encodeFooter } from '../blobserve/layer/estargz/footer.js';
import { END, entry, header, pax, type HeaderFields } from './hand-made-tar.js';

export interface EstargzFile {
  readonly name: string;
  readonly data?: Buffer | string;
  /** Of what is no file: as in a tar's header, and in a table's entry. */
  readonly type?: 'dir' | 'symlink' | 'hardlink' | 'char' | 'block' | 'fifo';
  readonly link?: string;
  readonly mode?: number;
  readonly uid?: number;
  readonly mtime?: number;
  readonly major?: number;
  readonly minor?: number;
  readonly xattrs?: Readonly<Record<string, string>>;
}

export interface EstargzOptions {
  /** Bytes of a file in one chunk. */
  readonly chunkSize?: number;
  /** Several files to a member, as `--estargz-min-chunk-size` makes them: how many. */
  readonly filesInMember?: number;
  /** Changes the table before it is written. */
  readonly change?: (entries: TocEntry[]) => unknown;
  /** Changes the table's JSON. */
  readonly rewrite?: (json: string) => string;
  /** In place of the footer that there should be. */
  readonly footer?: (tocStart: number) => Buffer;
}

export type TocEntry = Record<string, unknown>;

export interface EstargzLayer {
  readonly blob: Buffer;
  /** What the blob unpacks to. */
  readonly tar: Buffer;
  readonly json: Buffer;
  readonly tocDigest: string;
  readonly tocStart: number;
}

const TAR_TYPES = { dir: '5', symlink: '2', hardlink: '1', char: '3', block: '4', fifo: '6' } as const;

export const sha256 = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

function headerOf(file: EstargzFile, size: number): Buffer {
  const { name, type, link, mode = 0o644, uid = 0, mtime = 0, major, minor } = file;
  const fields: HeaderFields = {
    ...{ name, mode, uid, mtime, size },
    type: type === undefined ? '0' : TAR_TYPES[type],
    ...(link !== undefined && { linkName: link }),
    ...(major !== undefined && { devMajor: major }),
    ...(minor !== undefined && { devMinor: minor }),
  };
  const records = Object.entries(file.xattrs ?? {}).map(([key, value]) => [
    `SCHILY.xattr.${key}`,
    Buffer.from(value),
  ]);
  return Buffer.concat([
    ...(records.length > 0 ? [pax(Object.fromEntries(records) as Record<string, Buffer>)] : []),
    header(fields),
  ]);
}

function tocEntry(file: EstargzFile): TocEntry {
  const { name, type, link, mode = 0o644, uid = 0, mtime = 0, major, minor, xattrs } = file;
  return {
    name,
    type: type ?? 'reg',
    ...(mtime > 0 && { modtime: new Date(mtime * 1000).toISOString().replace('.000', '') }),
    ...(link !== undefined && { linkName: link }),
    ...{ mode, uid, gid: 0 },
    ...(major !== undefined && { devMajor: major }),
    ...(minor !== undefined && { devMinor: minor }),
    ...(xattrs !== undefined && {
      xattrs: Object.fromEntries(
        Object.entries(xattrs).map(([key, value]) => [key, Buffer.from(value).toString('base64')]),
      ),
    }),
  };
}

/** Members of a blob, each with what it unpacks to. */
class Members {
  readonly stored: Buffer[] = [];
  readonly unpacked: Buffer[] = [];
  size = 0;
  #open: Buffer[] = [];

  get inner(): number {
    return this.#open.reduce((sum, { length }) => sum + length, 0);
  }

  write(bytes: Buffer): void {
    this.#open.push(bytes);
  }

  close(): void {
    if (this.inner === 0) return;
    const bytes = Buffer.concat(this.#open);
    const stored = gzipSync(bytes);
    this.#open = [];
    this.unpacked.push(bytes);
    this.stored.push(stored);
    this.size += stored.length;
  }
}

export function estargz(files: readonly EstargzFile[], options: EstargzOptions = {}): EstargzLayer {
  const { chunkSize = 4096, filesInMember = 1 } = options;
  const members = new Members();
  const entries: TocEntry[] = [];
  let inMember = 0;
  for (const file of files) {
    const data = Buffer.from((file.data ?? '') as string);
    members.write(headerOf(file, data.length));
    const first = tocEntry(file);
    entries.push(first);
    if (file.type !== undefined) continue;
    Object.assign(first, { size: data.length, digest: sha256(data) });
    for (let at = 0; at < data.length; at += chunkSize) {
      const piece = data.subarray(at, at + chunkSize);
      if (inMember === 0 || inMember % filesInMember === 0) members.close();
      inMember++;
      const chunk = at === 0 ? first : { name: file.name, type: 'chunk' };
      if (at > 0) entries.push(chunk);
      Object.assign(chunk, { offset: members.size, innerOffset: members.inner });
      Object.assign(chunk, {
        chunkDigest: sha256(piece),
        chunkOffset: at,
        ...(piece.length === chunkSize && { chunkSize }),
      });
      members.write(piece);
    }
    members.write(Buffer.alloc((512 - (data.length % 512)) % 512));
  }
  members.close();
  options.change?.(entries);
  const text = JSON.stringify({ version: 1, entries }, undefined, '\t');
  const json = Buffer.from(options.rewrite?.(text) ?? text);
  const tocStart = members.size;
  members.write(Buffer.concat([entry({ name: 'stargz.index.json', mode: 0 }, json), END]));
  members.close();
  const blob = Buffer.concat([...members.stored, (options.footer ?? encodeFooter)(tocStart)]);
  return { blob, tar: Buffer.concat(members.unpacked), json, tocDigest: sha256(json), tocStart };
}
