/**
 * The files of an image that a container of it reads first: the program that it begins with, the ones that this begins as far
 * as that can be seen, their interpreters and shared libraries. Found as the kernel, ld.so and a shell find them.
 *
 * How ld.so looks for libraries: ld.so(8); musl, ldso/dynlink.c.
 */
import path from 'node:path';
import { ErofsFormatError } from '../layer/erofs/super-block.js';
import { ElfError, isElf } from './elf.js';
import { type ElfFacts, HEAD_SIZE, readElf } from './elf-file.js';
import type { ImageFile, ImageTree } from './image-tree.js';
import { parseLibraryCache } from './library-cache.js';
import { begunBy, interpreterOf, type StartCommand } from './start-command.js';

/** The first bytes of a file. */
export interface WantedFile extends ImageFile {
  readonly length: number;
}

export interface StartFilesOptions {
  readonly tree: ImageTree;
  readonly command: StartCommand;
  /** Bytes of all files together, at most. */
  readonly maxBytes: number;
  /** Is told of files as they are found, several at once where they are found at once. */
  readonly found: (files: readonly WantedFile[]) => void;
}

const FILES_MAX = 256;
/** Programs that begin one another, and libraries that need one another. */
const PROGRAMS_MAX = 8;
const LEVELS_MAX = 16;
/** Places where one library is looked for. */
const CANDIDATES_MAX = 64;
/** Files of so many bytes are wanted as a whole before it is known what is in them; of larger ones, what is loaded. */
const WHOLE_MAX = 4 * 2 ** 20;
const LIBRARY_CACHE_MAX = 4 * 2 ** 20;
const LIBRARY_CACHE = '/etc/ld.so.cache';
/** The runtime looks up the user in them. */
const ACCOUNTS = ['/etc/passwd', '/etc/group'];
/** Debian's directories, by e_machine. */
const TRIPLETS: Readonly<Record<number, string>> = {
  3: 'i386-linux-gnu',
  21: 'powerpc64le-linux-gnu',
  22: 's390x-linux-gnu',
  40: 'arm-linux-gnueabihf',
  62: 'x86_64-linux-gnu',
  183: 'aarch64-linux-gnu',
  243: 'riscv64-linux-gnu',
};
const MUSL_DIRECTORIES = ['/lib', '/usr/local/lib', '/usr/lib'];

interface Binary {
  readonly file: ImageFile;
  readonly facts: ElfFacts;
}

/** Where the libraries of one program are looked for. */
interface LoaderView {
  readonly program: Binary;
  /** By name, as ldconfig has noted. */
  readonly noted: ReadonlyMap<string, readonly string[]>;
  readonly directories: readonly string[];
}

/** A name on its way to being a file: what is found and is for another processor is passed over. */
interface Search {
  readonly name: string;
  readonly candidates: Iterator<string>;
}

/**
 * Looks for them, and tells of each.
 *
 * @throws what the readers of the layers throw; not for what is in the image, which is passed over
 */
export async function startFiles(options: StartFilesOptions): Promise<void> {
  await new StartFiles(options).run();
}

class StartFiles {
  readonly #options: StartFilesOptions;
  readonly #told = new Map<string, number>();
  readonly #programs = new Set<string>();
  #bytes = 0;

  constructor(options: StartFilesOptions) {
    this.#options = options;
  }

  async run(): Promise<void> {
    const { words } = this.#options.command;
    this.#tellWhole(await Promise.all(ACCOUNTS.map((name) => this.#file(name))));
    await this.#program(words.map(bytesOf));
  }

  async #program(words: readonly string[]): Promise<void> {
    const [name = ''] = words;
    if (name === '' || this.#programs.has(name) || this.#programs.size >= PROGRAMS_MAX) return;
    this.#programs.add(name);
    const file = await this.#executable(name);
    if (file === undefined) return;
    const head = await this.#head(file);
    const interpreter = interpreterOf(head);
    if (interpreter !== undefined) {
      await this.#program([...interpreter.map(bytesOf), file.path]);
      await this.#program(this.#options.command.command.map(bytesOf));
      return;
    }
    if (isElf(head)) await this.#binary(file, head);
    await this.#program(begunBy(words));
  }

  /** As execvp looks for it. */
  async #executable(name: string): Promise<ImageFile | undefined> {
    const { searchPath, workingDirectory } = this.#options.command;
    const isPath = name.includes('/');
    const directories = isPath ? [workingDirectory] : searchPath;
    for (const directory of directories) {
      const file = await this.#file(isPath && name.startsWith('/') ? name : `${bytesOf(directory)}/${name}`);
      if (file !== undefined && (file.file.mode & 0o111) !== 0) return file;
    }
    return undefined;
  }

  async #binary(file: ImageFile, head: Buffer): Promise<void> {
    const facts = await this.#facts(file, head);
    if (facts === undefined) return;
    const { interpreter } = facts;
    if (interpreter === undefined) return;
    const [loader, view] = await Promise.all([
      this.#file(interpreter),
      this.#loaderView({ file, facts }, interpreter),
    ]);
    this.#tellWhole([loader]);
    const seen = new Set([path.posix.basename(interpreter)]);
    for (let level: Binary[] = [view.program], depth = 0; level.length > 0 && depth < LEVELS_MAX; depth++) {
      if (this.#told.size >= FILES_MAX) return;
      const searches: Search[] = [];
      for (const by of level) {
        for (const name of by.facts.needed.filter((one) => !seen.has(one))) {
          seen.add(name);
          searches.push({ name, candidates: candidates(name, by, view, this.#options.command) });
        }
      }
      level = await this.#libraries(searches, facts.architecture);
    }
  }

  async #loaderView(program: Binary, interpreter: string): Promise<LoaderView> {
    const musl = /^ld-musl-(.+)\.so\.1$/.exec(path.posix.basename(interpreter))?.[1];
    if (musl !== undefined) {
      const listed = await this.#file(`/etc/ld-musl-${musl}.path`);
      const text = listed && (await this.#content(listed, HEAD_SIZE)).toString('latin1');
      const directories = text?.split(/[\n:]/).filter((one) => one.startsWith('/')) ?? MUSL_DIRECTORIES;
      return { program, noted: new Map(), directories };
    }
    const cache = await this.#file(LIBRARY_CACHE);
    const isUsable = cache !== undefined && cache.file.size <= LIBRARY_CACHE_MAX;
    const noted = isUsable
      ? parseLibraryCache(await this.#content(cache, LIBRARY_CACHE_MAX))
      : new Map<string, string[]>();
    const triplet = TRIPLETS[program.facts.machine];
    const multiarch = triplet === undefined ? [] : [`/lib/${triplet}`, `/usr/lib/${triplet}`];
    return { program, noted, directories: [...multiarch, '/lib64', '/usr/lib64', '/lib', '/usr/lib'] };
  }

  /** The first file of each search that is for this architecture; told of together. */
  async #libraries(searches: readonly Search[], architecture: string): Promise<Binary[]> {
    const libraries: Binary[] = [];
    for (let open = searches; open.length > 0;) {
      const files = await Promise.all(
        open.map(async (search) => ({ search, file: await this.#next(search) })),
      );
      this.#tellWhole(files.map(({ file }) => file));
      const looked = await Promise.all(
        files.map(async ({ search, file }) => {
          const facts = file && (await this.#facts(file, await this.#head(file)));
          return { search, file, facts };
        }),
      );
      const again: Search[] = [];
      for (const { search, file, facts } of looked) {
        if (file === undefined) continue;
        if (facts?.architecture === architecture) libraries.push({ file, facts });
        else again.push(search);
      }
      open = again;
    }
    return libraries;
  }

  async #next({ candidates: names }: Search): Promise<ImageFile | undefined> {
    for (let next = names.next(); next.done !== true; next = names.next()) {
      const file = await this.#file(next.value);
      if (file !== undefined) return file;
    }
    return undefined;
  }

  /** Undefined for what is no ELF file that can be understood, or compressed in a way that is not read here. */
  async #facts(file: ImageFile, head: Buffer): Promise<ElfFacts | undefined> {
    const tree = this.#options.tree.tree(file.layer);
    const facts = await passingOver(() =>
      readElf(head, file.file.size, (offset, length) => tree.read(file.file, offset, length)),
    );
    this.#tell([{ ...file, length: facts?.loaded ?? Math.min(file.file.size, WHOLE_MAX) }]);
    return facts;
  }

  /** Its first bytes, and says before that the rest of it is wanted. Empty when they cannot be read. */
  #head(file: ImageFile): Promise<Buffer> {
    this.#tellWhole([file]);
    return this.#content(file, HEAD_SIZE);
  }

  async #content(file: ImageFile, length: number): Promise<Buffer> {
    if (length > HEAD_SIZE) this.#tellWhole([file]);
    const tree = this.#options.tree.tree(file.layer);
    return (await passingOver(() => tree.read(file.file, 0, length))) ?? Buffer.alloc(0);
  }

  #file(name: string): Promise<ImageFile | undefined> {
    return passingOver(() => this.#options.tree.regularFile(name));
  }

  #tellWhole(files: readonly (ImageFile | undefined)[]): void {
    const known = files.filter((file) => file !== undefined);
    this.#tell(known.map((file) => ({ ...file, length: file.file.size <= WHOLE_MAX ? file.file.size : 0 })));
  }

  #tell(files: readonly WantedFile[]): void {
    const news = files.filter((file) => {
      const key = `${file.layer} ${file.file.nid}`;
      const before = this.#told.get(key);
      const more = file.length - (before ?? 0);
      if (more <= 0 || this.#bytes + more > this.#options.maxBytes) return false;
      if (before === undefined && this.#told.size >= FILES_MAX) return false;
      this.#told.set(key, file.length);
      this.#bytes += more;
      return true;
    });
    if (news.length > 0) this.#options.found(news);
  }
}

/** Where ld.so looks for a library, in its order. */
function* candidates(
  name: string,
  by: Binary,
  { program, noted, directories }: LoaderView,
  { libraryPath, workingDirectory }: StartCommand,
): Generator<string> {
  if (name.includes('/')) {
    yield name.startsWith('/') ? name : `${bytesOf(workingDirectory)}/${name}`;
    return;
  }
  const own = (one: Binary, list: string | undefined): string[] => runPath(one, list ?? '');
  const rpaths = [by, program].flatMap((one) =>
    one.facts.runpath === undefined ? own(one, one.facts.rpath) : [],
  );
  const before = [...rpaths, ...libraryPath.map(bytesOf), ...own(by, by.facts.runpath)];
  const all = [...before.map((directory) => `${directory}/${name}`), ...(noted.get(name) ?? [])];
  for (const directory of directories) all.push(`${directory}/${name}`);
  yield* new Set(all.slice(0, CANDIDATES_MAX));
}

/** The directories of a run path, with what stands for the place of the file. */
function runPath({ file, facts }: Binary, list: string): string[] {
  const origin = path.posix.dirname(file.path);
  const triplet = TRIPLETS[facts.machine] ?? '';
  return list
    .split(':')
    .map((directory) =>
      directory
        .replace(/\$(?:ORIGIN|\{ORIGIN\})/g, () => origin)
        .replace(/\$(?:LIB|\{LIB\})/g, () => `lib/${triplet}`)
        .replace(/\$(?:PLATFORM|\{PLATFORM\})/g, () => triplet.split('-')[0] ?? ''),
    )
    .filter((directory) => directory.startsWith('/') && directory.length < 4096);
}

/** Text of the configuration as names are here: bytes as a latin1 string. */
function bytesOf(text: string): string {
  return Buffer.from(text, 'utf8').toString('latin1');
}

/** What is wrong with the image is for others to say, who read more of it. */
async function passingOver<T>(work: () => Promise<T>): Promise<T | undefined> {
  try {
    return await work();
  } catch (error) {
    if (error instanceof ErofsFormatError || error instanceof ElfError) return undefined;
    throw error;
  }
}
