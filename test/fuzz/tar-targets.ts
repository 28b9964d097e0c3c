/** Hostile tars, pax records and tarindexes. */
import { checkTarIndex } from '../../blobserve/layer/erofs/check.js';
import { SUPER_BLOCK, SUPER_OFFSET } from '../../blobserve/layer/erofs/format.js';
import { ErofsFormatError, superBlockChecksum } from '../../blobserve/layer/erofs/super-block.js';
import { buildTarIndex } from '../../blobserve/layer/erofs/tarindex.js';
import type { TarEntry } from '../../blobserve/layer/tar/entry.js';
import { PaxRecords } from '../../blobserve/layer/tar/pax.js';
import { TarScanner } from '../../blobserve/layer/tar/scanner.js';
import { TarError } from '../../blobserve/layer/tar/tar-error.js';
import { LayerTreeBuilder } from '../../blobserve/layer/tar/tree-builder.js';
import { base256, END, entry, header, longName, pax, paxRecord } from '../hand-made-tar.js';
import { randomLayer } from '../random-tree.js';
import { mutate, type Pick, picker, split } from './mutation.js';
import { attempt, must, type Outcome } from './outcome.js';

const LIMITS = { maxEntries: 300, maxExtendedHeader: 64 * 1024 };
const TREE_LIMITS = { maxInodes: 2000, maxMetadataBytes: 1024 * 1024 };

const NAMES = [
  'a',
  'b',
  'dir',
  '.',
  '..',
  '',
  '.wh.a',
  '.wh..wh..opq',
  '.wh..wh.plnk',
  'n'.repeat(255),
  '\xff\xfe',
];

function somePath(pick: Pick): string {
  const depth = pick(12) === 0 ? 1 + pick(2500) : 1 + pick(5);
  const parts = Array.from({ length: depth }, () => NAMES[pick(NAMES.length)] ?? 'a');
  return (pick(5) === 0 ? '/' : '') + parts.join('/');
}

function someTar(pick: Pick): Buffer {
  const parts: Buffer[] = [];
  for (let count = 1 + pick(25); count > 0; count--) {
    const path = somePath(pick);
    const name = path.slice(0, 100);
    const linkName = somePath(pick).slice(0, 100);
    const mtime = pick(4) === 0 ? base256(-BigInt(pick(1 << 30)), 12) : pick(2 ** 31);
    switch (pick(9)) {
      case 0:
        parts.push(header({ name, type: '5', mtime }));
        break;
      case 1:
        parts.push(
          header({ name, type: '125346'[pick(6)] ?? '1', linkName, devMajor: pick(5000), devMinor: 3 }),
        );
        break;
      case 2:
        parts.push(longName(pick(2) ? 'L' : 'K', path));
        break;
      case 3: {
        const records = {
          [['path', 'linkpath', 'size', 'uid', 'mtime', 'GNU.sparse.major'][pick(6)] ?? 'path']:
            somePaxValue(pick),
          'SCHILY.xattr.user.x': Buffer.alloc(pick(pick(9) ? 40 : 70_000), 0x61),
        };
        parts.push(pax(records, pick(4) ? 'x' : 'g'));
        break;
      }
      case 4:
        parts.push(Buffer.alloc(512));
        break;
      default:
        parts.push(entry({ name, mtime, magic: pick(3) ? 'ustar' : 'gnu' }, Buffer.alloc(pick(3000), 0x62)));
    }
  }
  if (pick(5)) parts.push(END);
  return Buffer.concat(parts);
}

function somePaxValue(pick: Pick): string {
  return (
    ['1', '-1', '9007199254740993', '1e3', '1.5', '-0.5', '', 'x', '17.1234567890123', 'a\0b'][pick(10)] ?? ''
  );
}

/** Damages headers and makes their checksums right again, so that the damage gets past the first look. */
function damageHeaders(tar: Buffer, pick: Pick): Buffer {
  const damaged = Buffer.from(tar);
  for (let edits = pick(6); edits > 0; edits--) {
    const at = pick(Math.floor(damaged.length / 512)) * 512;
    if (at + 512 > damaged.length) break;
    const block = damaged.subarray(at, at + 512);
    mutate(block, pick, true).copy(block);
    if (pick(10) === 0) continue;
    block.fill(0x20, 148, 156);
    const sum = block.reduce((total, byte) => total + byte, 0);
    block.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
  }
  return damaged;
}

function scan(
  pieces: readonly Buffer[],
  tree: LayerTreeBuilder,
  resumeAt = -1,
): Outcome<[TarEntry[], number]> {
  const entries: TarEntry[] = [];
  const onEntry = (found: TarEntry): void => {
    entries.push(found);
    tree.add(found);
  };
  return attempt(() => {
    let scanner = new TarScanner(onEntry, LIMITS);
    for (const [i, piece] of pieces.entries()) {
      if (i === resumeAt) {
        const state = structuredClone(scanner.save());
        scanner = new TarScanner(onEntry, LIMITS);
        scanner.resume(withBuffers(state));
      }
      scanner.write(piece);
    }
    return [entries, scanner.end().size] as [TarEntry[], number];
  }, TarError);
}

/** A structured clone has Uint8Arrays where Buffers were. */
function withBuffers<T>(value: T): T {
  if (value instanceof Uint8Array) return Buffer.from(value) as T;
  if (value instanceof Map) return new Map([...value].map(([key, held]) => [key, withBuffers(held)])) as T;
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([key, held]) => [key, withBuffers(held)])) as T;
}

/** A tar is read the same however it is cut and wherever the scanner is gone on with; what is made of it is sound. */
export function scanner(seed: number): void {
  const pick = picker(seed);
  const whole = someTar(pick);
  const tar = pick(4) ? damageHeaders(whole, pick) : mutate(whole, pick);
  const tree = new LayerTreeBuilder(TREE_LIMITS);
  const outcome = scan([tar], tree);
  const pieces = split(tar, pick);
  const again = scan(pieces, new LayerTreeBuilder(TREE_LIMITS), pick(pieces.length));
  must(
    JSON.stringify(outcome) === JSON.stringify(again),
    'another outcome when the stream is cut differently',
  );
  if ('refused' in outcome) {
    must(/at offset \d+: ./.test(outcome.refused), `a refusal that does not say where: ${outcome.refused}`);
    return;
  }
  const [, size] = outcome.value;
  const built = attempt(
    () => Buffer.concat([...buildTarIndex(tree.finish(), size).chunks()]),
    ErofsFormatError,
  );
  if ('refused' in built) return;
  const facts = checkTarIndex(built.value, size);
  must(facts.inodes > 0, 'an index without inodes');
}

/** Records are taken or refused; what is taken is what was there. */
export function paxRecords(seed: number): void {
  const pick = picker(seed);
  const expected = new Map<string, string>();
  const parts: Buffer[] = [];
  for (let count = pick(8); count > 0; count--) {
    const key =
      ['path', 'linkpath', 'comment', 'SCHILY.xattr.user.a', 'LIBARCHIVE.xattr.user.b'][pick(5)] ?? '';
    const value = 'v='.repeat(pick(pick(8) ? 20 : 9000)) + 'YQ=='.slice(0, pick(2) * 4);
    if (!key.startsWith('LIBARCHIVE')) {
      parts.push(paxRecord(key, value));
      expected.set(key, value);
    } else parts.push(paxRecord(key, 'YWJj'.repeat(pick(9))));
  }
  const right = Buffer.concat(parts);
  const records = new PaxRecords();
  records.add(right, 0);
  must((records.path ?? '') === (expected.get('path') ?? ''), 'another path than was written');
  must((records.linkPath ?? '') === (expected.get('linkpath') ?? ''), 'another link path than was written');
  const xattr = expected.get('SCHILY.xattr.user.a');
  must(records.xattrs?.get('user.a')?.toString('latin1') === xattr, 'another xattr than was written');

  const wrong = mutate(right, pick);
  const damaged = new PaxRecords();
  attempt(() => {
    damaged.add(wrong, 0);
    for (const key of ['size', 'uid', 'gid'] as const) damaged.integer(key, 0);
    damaged.mtime(0);
  }, TarError);
  must(damaged.held <= wrong.length, `${damaged.held} bytes held of ${wrong.length}`);
}

/** A damaged index is refused, or accepted with every number in it checked; in time linear in its size. */
export function tarindex(seed: number): void {
  const pick = picker(seed);
  const { tree, tarSize } = randomLayer(seed, 1 + pick(60));
  const image = Buffer.concat([...buildTarIndex(tree, tarSize).chunks()]);
  checkTarIndex(image, tarSize);
  const damaged = mutate(image, pick, pick(4) > 0, pick(3) ? SUPER_OFFSET : 0);
  if (damaged.length >= 512 * 3 && pick(20)) {
    damaged.writeUInt32LE(superBlockChecksum(damaged, 512), SUPER_OFFSET + SUPER_BLOCK.offsets.checksum);
  }
  const outcome = attempt(() => checkTarIndex(damaged, tarSize), ErofsFormatError);
  if ('refused' in outcome) return;
  const { inodes, fileBytes } = outcome.value;
  must(inodes <= damaged.length / 32, `${inodes} inodes in ${damaged.length} bytes`);
  must(Number.isSafeInteger(fileBytes), `files of ${fileBytes} bytes`);
}
