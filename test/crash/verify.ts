/**
 * `npm run test:crash -- --verify --root DIRECTORY --blobs DIRECTORY…`: what is on the disk of a node whose daemons do not
 * run. Every span that the cache marks as valid is compared with the blob it is of, and SQLite checks its database.
 * Nothing is changed.
 *
 * The maps are read by the format that blobserve/readers/span-map.ts writes down, not by its code.
 */
import { createHash } from 'node:crypto';
import { copyFile, mkdtemp, open, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { crc32 } from 'node:zlib';
import Database from 'better-sqlite3';

/** A blob as it left the registry: its file, or its bytes. */
export type Original = string | Buffer;

export interface Verdict {
  /** Blobs in the cache, and how many of their maps are trusted. */
  readonly blobs: number;
  readonly trusted: number;
  /** Spans marked as valid, all of which were compared. */
  readonly spans: number;
  readonly bytes: number;
  readonly rows: Readonly<Record<string, number>>;
  /** What is wrong, in words; empty when nothing is. */
  readonly failures: readonly string[];
}

const HEADER = 256;
const ENTRY = 16;
const MARKED = 0x6e617073;

interface Map {
  readonly digest: string;
  readonly spanSize: number;
  readonly blobSize: number;
  readonly marked: readonly number[];
}

/** Undefined when a daemon would not trust it either: its header is not whole, or its length is another. */
function decodeMap(bytes: Buffer): Map | undefined {
  if (bytes.length < HEADER || bytes.toString('latin1', 0, 8) !== 'enbdspan') return undefined;
  const seed = bytes.readUInt32LE(252);
  if (crc32(bytes.subarray(0, 252)) !== seed) return undefined;
  const spanSize = bytes.readUInt32LE(12);
  const blobSize = Number(bytes.readBigUInt64LE(16));
  const count = Math.ceil(blobSize / spanSize);
  if (bytes.length !== HEADER + count * ENTRY) return undefined;
  const marked: number[] = [];
  for (let span = 0; span < count; span += 1) {
    const entry = bytes.subarray(HEADER + span * ENTRY, HEADER + (span + 1) * ENTRY);
    const right =
      entry.readUInt32LE(4) === span && entry.readUInt32LE(12) === crc32(entry.subarray(0, 12), seed);
    if (right && entry.readUInt32LE(0) === MARKED) marked.push(span);
  }
  return { digest: bytes.toString('latin1', 24, 184).replace(/\0+$/, ''), spanSize, blobSize, marked };
}

async function compareBlob(map: Map, file: string, original: Buffer): Promise<string[]> {
  const failures: string[] = [];
  if (map.blobSize !== original.length)
    return [`${file}: its map speaks of ${map.blobSize} bytes, the blob has ${original.length}`];
  const handle = await open(file, 'r');
  try {
    for (const span of map.marked) {
      const from = span * map.spanSize;
      const wanted = original.subarray(from, from + map.spanSize);
      const found = Buffer.alloc(wanted.length);
      const { bytesRead } = await handle.read(found, 0, found.length, from);
      if (bytesRead === wanted.length && found.equals(wanted)) continue;
      const at = found.findIndex((byte, index) => byte !== wanted[index]);
      const what = found.every((byte) => byte === 0) ? 'zeros' : `wrong from byte ${from + at} on`;
      failures.push(`${file}: span ${span} is marked as valid and is ${what} (${bytesRead} bytes there)`);
    }
  } finally {
    await handle.close();
  }
  return failures;
}

/** Of a copy, log included: opening the database itself would write to it. */
async function checkDatabase(file: string): Promise<{ rows: Record<string, number>; failures: string[] }> {
  const directory = await mkdtemp(path.join(tmpdir(), 'erofs-nbd-verify-'));
  try {
    const copy = path.join(directory, 'metadata.db');
    await copyFile(file, copy);
    await copyFile(`${file}-wal`, `${copy}-wal`).catch(() => undefined);
    const sqlite = new Database(copy);
    try {
      const verdicts = (sqlite.pragma('integrity_check') as { integrity_check: string }[]).map(
        (row) => row.integrity_check,
      );
      const strays = sqlite.pragma('foreign_key_check') as unknown[];
      const rows: Record<string, number> = {};
      for (const table of ['snapshots', 'layers', 'devices']) {
        rows[table] = (sqlite.prepare(`SELECT count(*) AS n FROM ${table}`).get() as { n: number }).n;
      }
      return {
        rows,
        failures: [
          ...verdicts.filter((verdict) => verdict !== 'ok').map((verdict) => `${file}: ${verdict}`),
          ...strays.map((stray) => `${file}: a row without the one it belongs to: ${JSON.stringify(stray)}`),
        ],
      };
    } finally {
      sqlite.close();
    }
  } catch (error) {
    return { rows: {}, failures: [`${file}: ${String(error)}`] };
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

/**
 * @param root of a daemon that does not run
 * @param original the blob of a digest; undefined when it is not known, which is a failure: nothing can be said then
 */
export async function verifyRoot(
  root: string,
  original: (digest: string) => Promise<Original | undefined>,
): Promise<Verdict> {
  const failures: string[] = [];
  let [blobs, trusted, spans, bytes] = [0, 0, 0, 0];
  const cache = path.join(root, 'cache');
  const entries = await readdir(cache, { recursive: true }).catch((): string[] => []);
  for (const name of entries.filter((entry) => entry.endsWith('.map'))) {
    blobs += 1;
    const file = path.join(cache, name);
    const map = decodeMap(await readFile(file));
    if (map === undefined) continue;
    trusted += 1;
    if (map.marked.length === 0) continue;
    const known = await original(map.digest);
    const whole = typeof known === 'string' ? await readFile(known) : known;
    if (whole === undefined) {
      failures.push(`${file}: the blob ${map.digest} is in none of the directories given`);
      continue;
    }
    if (`sha256:${createHash('sha256').update(whole).digest('hex')}` !== map.digest) {
      failures.push(`${map.digest}: what it would be compared with has another digest`);
      continue;
    }
    failures.push(...(await compareBlob(map, file.replace(/\.map$/, '.data'), whole)));
    spans += map.marked.length;
    for (const span of map.marked) bytes += Math.min(map.spanSize, map.blobSize - span * map.spanSize);
  }
  const { rows, failures: ofDatabase } = await checkDatabase(path.join(root, 'metadata.db'));
  return { blobs, trusted, spans, bytes, rows, failures: [...failures, ...ofDatabase] };
}

/** Blobs by digest in directories as an OCI layout has them (`DIRECTORY[/blobs]/sha256/HEX`). */
export function originalsIn(directories: readonly string[]): (digest: string) => Promise<string | undefined> {
  return async (digest) => {
    const [algorithm = '', hex = ''] = digest.split(':');
    for (const directory of directories) {
      for (const parent of [directory, path.join(directory, 'blobs')]) {
        const names = await readdir(path.join(parent, algorithm)).catch((): string[] => []);
        if (names.includes(hex)) return path.join(parent, algorithm, hex);
      }
    }
    return undefined;
  };
}

/** Prints what was found, the last line as one JSON object. @returns whether all is right */
export function reportVerdict(root: string, verdict: Verdict): boolean {
  const { blobs, trusted, spans, bytes, rows, failures } = verdict;
  console.log(
    `${root}: ${blobs} blobs, ${trusted} with a map that is trusted; ${spans} spans (${(bytes / 2 ** 20).toFixed(1)} MiB) ` +
      `are marked as valid; rows: ${JSON.stringify(rows)}`,
  );
  for (const failure of failures) console.log(`FAILED  ${failure}`);
  const ok = failures.length === 0;
  console.log(JSON.stringify({ ok, blobs, trusted, spans, bytes, rows, wrong: failures.length }));
  return ok;
}
