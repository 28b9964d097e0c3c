/** Hostile eStargz layers: tables of contents that lie or are damaged, footers that lead anywhere. */
import { ChunkTable, ChunkTableError } from '../../blobserve/layer/chunks/chunk-table.js';
import { ErofsFormatError } from '../../blobserve/layer/erofs/super-block.js';
import { EstargzError } from '../../blobserve/layer/estargz/estargz-error.js';
import { makeEstargzIndex } from '../../blobserve/layer/estargz/estargz-import.js';
import { FOOTER_SIZE, parseFooter } from '../../blobserve/layer/estargz/footer.js';
import { ReadError } from '../../blobserve/readers/blob-reader.js';
import { ChunksReader } from '../../blobserve/readers/chunks.js';
import { InflatedCache } from '../../blobserve/readers/inflated-cache.js';
import { estargz as layerOf, type EstargzFile, type TocEntry } from '../hand-made-estargz.js';
import { MemoryBlob } from '../memory-blob.js';
import { mutate, type Pick, picker } from './mutation.js';
import { attempt, attemptAsync, must } from './outcome.js';

const MAX_TOC = 2 ** 20;
const LIMITS = { maxUncompressedBytes: 2 ** 24, maxEntries: 200, maxTocBytes: MAX_TOC, tocDigest: undefined };
const NAMES = [
  'a',
  'b',
  'd/a',
  'd/e/f',
  './x',
  '/abs',
  '../up',
  '.wh.a',
  'd/.wh..wh..opq',
  '.prefetch.landmark',
];
const TYPES = ['dir', 'symlink', 'char', 'block', 'fifo'] as const;

/** What a field may be, that it should not. */
const VALUES: readonly unknown[] = [
  ...[
    0,
    -1,
    1,
    1.5,
    511,
    2 ** 31,
    2 ** 32,
    2 ** 53,
    1e300,
    null,
    '',
    'x',
    '\0',
    '\ufffd',
    '\ud800',
    [],
    {},
    true,
  ],
  ...['reg', 'dir', 'chunk', 'hardlink', '__proto__', 'a/'.repeat(2100), `sha256:${'0'.repeat(64)}`],
  { 'user.x': 'eHg=' },
  { '': 'x' },
];

function someFiles(pick: Pick): EstargzFile[] {
  return Array.from({ length: 1 + pick(12) }, () => {
    const name = NAMES[pick(NAMES.length)] ?? 'a';
    const type = pick(3) === 0 ? TYPES[pick(TYPES.length)] : undefined;
    const data = Buffer.alloc(pick(3) === 0 ? pick(20_000) : pick(700), pick(256));
    return type === undefined
      ? { name, data }
      : { name, type, link: 'a', major: pick(300), minor: pick(300) };
  });
}

function damageEntries(entries: TocEntry[], pick: Pick): void {
  for (let edits = pick(4); edits > 0 && entries.length > 0; edits--) {
    const at = pick(entries.length);
    const entry = entries[at] ?? {};
    const keys = [...Object.keys(entry), 'chunkOffset', 'innerOffset', 'xattrs', 'linkName', 'devMajor'];
    switch (pick(5)) {
      case 0:
        entries.splice(at, 1);
        break;
      case 1:
        entries.splice(pick(entries.length), 0, { ...entry });
        break;
      case 2: {
        const other = entries[pick(entries.length)] ?? {};
        const key = keys[pick(keys.length)] ?? 'offset';
        entry[key] = other[key];
        break;
      }
      default:
        entry[keys[pick(keys.length)] ?? 'size'] = VALUES[pick(VALUES.length)];
    }
  }
}

/** A table is refused, or leads to bytes that have its digests, inside the layer. */
export async function estargz(seed: number): Promise<void> {
  const pick = picker(seed);
  const options = {
    chunkSize: 512 * (1 + pick(9)),
    filesInMember: 1 + pick(3),
    change: (entries: TocEntry[]) => damageEntries(entries, pick),
    rewrite: (json: string) => (pick(6) ? json : mutate(Buffer.from(json), pick).toString('latin1')),
  };
  const { blob: whole } = layerOf(someFiles(pick), options);
  const blob = pick(4)
    ? whole
    : mutate(whole, pick, pick(2) === 0, pick(2) * Math.max(0, whole.length - 300));
  if (blob.length <= FOOTER_SIZE) return;
  const place = attempt(() => parseFooter(blob.subarray(-FOOTER_SIZE), blob.length, MAX_TOC), EstargzError);
  if ('refused' in place || place.value === undefined) return;
  const { start, end } = place.value;
  must(start >= 0 && start < end && end <= blob.length, `a table at ${start} to ${end} of ${blob.length}`);
  const made = attempt(
    () =>
      makeEstargzIndex(blob.subarray(start, end), {
        ...{ size: blob.length, tocStart: start, tocEnd: end },
        ...LIMITS,
      }),
    EstargzError,
    ChunkTableError,
    ErofsFormatError,
  );
  if ('refused' in made) return;
  const { table: bytes, dataSize } = made.value;
  must(dataSize <= LIMITS.maxUncompressedBytes + MAX_TOC + 512, `a data area of ${dataSize} bytes`);
  const table = ChunkTable.parse(bytes);
  const next = new MemoryBlob(blob);
  const reader = new ChunksReader({ name: 'layer', next, table, cache: new InflatedCache(2 ** 20) });
  try {
    for (let index = 0; index < table.count; index++) {
      const { at, size } = table.chunk(index);
      await attemptAsync(() => reader.read(Buffer.alloc(Math.min(size, 2 ** 16)), at), ReadError);
    }
  } finally {
    await reader.close();
  }
}

/** A table of chunks is read as it was written, or refused. */
export function chunks(seed: number): void {
  const pick = picker(seed);
  const { blob, tocStart } = layerOf(someFiles(pick), { filesInMember: 1 + pick(3) });
  const end = blob.length - FOOTER_SIZE;
  const { table } = makeEstargzIndex(blob.subarray(tocStart, end), {
    ...{ size: blob.length, tocStart, tocEnd: end },
    ...LIMITS,
  });
  const damaged = mutate(table, pick);
  const outcome = attempt(() => ChunkTable.parse(damaged), ChunkTableError);
  must('refused' in outcome || damaged.equals(table), 'a damaged table was taken');
}
