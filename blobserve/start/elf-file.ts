/**
 * What an ELF file says that it needs, by a few small reads of it.
 */
import {
  DYNAMIC_MAX,
  type DynamicSection,
  ElfError,
  offsetOf,
  parseDynamic,
  parseElfHeader,
  parseSegments,
  type Segment,
  SEGMENT,
  textOf,
} from './elf.js';

export interface ElfFacts {
  /** Files of another architecture are passed over by ld.so. */
  readonly architecture: string;
  /** e_machine. */
  readonly machine: number;
  /** Path of ld.so; undefined for a static program, and for a library. Names are bytes as latin1 strings. */
  readonly interpreter: string | undefined;
  readonly needed: readonly string[];
  readonly rpath: string | undefined;
  readonly runpath: string | undefined;
  /** Bytes from its start that are ever mapped: debug information comes behind them. */
  readonly loaded: number;
}

/** Bytes of the start of a file that are read at once: in most files the headers and the interpreter are there. */
export const HEAD_SIZE = 4096;
/** PATH_MAX; a run path may be longer, and is not used then. */
const NAME_MAX = 4096;
/** Bytes of names that are read at once. */
const NAMES_MAX = 64 * 1024;

/**
 * @param head the first {@link HEAD_SIZE} bytes, or all there are
 * @param read bytes of the file; never asked for more than there are
 * @throws {ElfError}
 */
export async function readElf(
  head: Buffer,
  size: number,
  read: (offset: number, length: number) => Promise<Buffer>,
): Promise<ElfFacts> {
  const at = async (what: string, offset: number, length: number): Promise<Buffer> => {
    if (!Number.isSafeInteger(offset + length) || offset + length > size) {
      throw new ElfError(what, `at ${offset}, ${length} bytes`, `within ${size} bytes`);
    }
    return offset + length <= head.length ? head.subarray(offset, offset + length) : read(offset, length);
  };
  const header = parseElfHeader(head);
  const { offset, count, size: each } = header.segments;
  const segments = parseSegments(await at('program headers', offset, count * each), header);
  const loads = segments.filter(({ type }) => type === SEGMENT.LOAD);
  const loaded = Math.min(size, Math.max(head.length, ...loads.map((load) => load.offset + load.length)));

  const interpreterAt = segments.find(({ type }) => type === SEGMENT.INTERPRETER);
  if (interpreterAt !== undefined && interpreterAt.length > NAME_MAX) {
    throw new ElfError('interpreter', `${interpreterAt.length} bytes`, `at most ${NAME_MAX}`);
  }
  const interpreter =
    interpreterAt && textOf(await at('interpreter', interpreterAt.offset, interpreterAt.length));

  const dynamicAt = segments.find(({ type }) => type === SEGMENT.DYNAMIC);
  let dynamic: DynamicSection | undefined;
  if (dynamicAt !== undefined) {
    const length = Math.min(dynamicAt.length, DYNAMIC_MAX);
    dynamic = parseDynamic(await at('dynamic section', dynamicAt.offset, length), header);
  }
  const names = await namesOf(dynamic, loads, size, at);
  return {
    architecture: `${header.machine} ${header.bits} ${header.littleEndian}`,
    machine: header.machine,
    interpreter,
    needed: (dynamic?.needed ?? []).map((place) => names.get(place) ?? ''),
    rpath: dynamic?.rpath === undefined ? undefined : names.get(dynamic.rpath),
    runpath: dynamic?.runpath === undefined ? undefined : names.get(dynamic.runpath),
    loaded,
  };
}

/** The names that a dynamic section refers to, by their places; neighbours come in one read. */
async function namesOf(
  dynamic: DynamicSection | undefined,
  loads: readonly Segment[],
  size: number,
  at: (what: string, offset: number, length: number) => Promise<Buffer>,
): Promise<ReadonlyMap<number, string>> {
  const names = new Map<number, string>();
  if (dynamic === undefined) return names;
  const { needed, rpath, runpath, strings } = dynamic;
  const places = [...needed, rpath, runpath].filter((place) => place !== undefined).sort((a, b) => a - b);
  let [start, bytes]: [number, Buffer] = [0, Buffer.alloc(0)];
  for (const place of new Set(places)) {
    if (place >= strings.length)
      throw new ElfError('name', `at ${place}`, `within ${strings.length} bytes of names`);
    if (place < start || place + NAME_MAX > start + bytes.length) {
      const offset = offsetOf(loads, strings.address + place);
      if (offset === undefined)
        throw new ElfError('name', `at address ${strings.address + place}`, 'one that is loaded');
      const length = Math.min(NAMES_MAX, strings.length - place, size - offset);
      // What is at hand may be all there is.
      const isLast = bytes.length > 0 && start + bytes.length >= strings.length;
      if (!isLast) [start, bytes] = [place, await at('name', offset, Math.max(0, length))];
    }
    names.set(place, textOf(bytes.subarray(place - start, place - start + NAME_MAX)));
  }
  return names;
}
