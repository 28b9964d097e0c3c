import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { ErofsTree } from '../layer/erofs/tree-reader.js';
import { ImageTree } from './image-tree.js';
import { startCommand } from './start-command.js';
import { startFiles } from './start-files.js';
import { handMadeElf } from './testing/hand-made-elf.js';

const has = (program: string): boolean => {
  try {
    execFileSync('sh', ['-c', `command -v ${program}`]);
    return true;
  } catch {
    return false;
  }
};

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(path.join(tmpdir(), 'start-files-'));
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

/** A file by its content; a symbolic link by an arrow before its target; null: a whiteout. */
type Content = Buffer | string | null;
const OPAQUE = '.opaque';

let made = 0;
async function layer(
  files: Readonly<Record<string, Content>>,
  options: readonly string[] = [],
): Promise<ErofsTree> {
  const tree = path.join(directory, `layer-${made++}`);
  mkdirSync(tree);
  for (const [name, content] of Object.entries(files)) {
    const file = path.join(tree, name);
    mkdirSync(path.dirname(file), { recursive: true });
    if (path.basename(name) === OPAQUE) {
      execFileSync('setfattr', ['-n', 'trusted.overlay.opaque', '-v', 'y', path.dirname(file)]);
    } else if (content === null) execFileSync('mknod', [file, 'c', '0', '0']);
    else if (typeof content === 'string' && content.startsWith('->')) symlinkSync(content.slice(2), file);
    else {
      writeFileSync(file, content);
      chmodSync(file, 0o755);
    }
  }
  return imageOf(tree, options);
}

async function imageOf(tree: string, options: readonly string[]): Promise<ErofsTree> {
  execFileSync('mkfs.erofs', ['--quiet', '-T0', ...options, `${tree}.erofs`, tree]);
  const bytes = readFileSync(`${tree}.erofs`);
  return ErofsTree.open(
    (offset, length) => Promise.resolve(bytes.subarray(offset, offset + length)),
    bytes.length,
  );
}

/** @param layers from the lowest up @returns each file told of, in order, with its layer if there are several */
async function found(layers: readonly ErofsTree[], config: object, maxBytes = 2 ** 30): Promise<string[]> {
  const told: string[] = [];
  const command = startCommand({ config });
  if (command === undefined) throw new Error('nothing to run');
  await startFiles({
    tree: new ImageTree([...layers].reverse()),
    command,
    maxBytes,
    found: (files) =>
      told.push(
        ...files.map((file) =>
          layers.length === 1 ? file.path : `${layers.length - 1 - file.layer}${file.path}`,
        ),
      ),
  });
  return told;
}

const INTERPRETER = '/lib64/ld-linux-x86-64.so.2';
const program = (...needed: string[]): Buffer => handMadeElf({ interpreter: INTERPRETER, needed });
const library = (...needed: string[]): Buffer => handMadeElf({ needed });
const LOADER = { [INTERPRETER.slice(1)]: library() };

describe.skipIf(!has('mkfs.erofs') || !has('setfattr') || process.getuid?.() !== 0)(
  'the files of a start',
  () => {
    it('are the program, its interpreter and its libraries, each once, wherever they are', async () => {
      const image = await layer({
        ...LOADER,
        'etc/passwd': 'root',
        bin: '->usr/bin',
        'usr/bin/app': program('liba.so', 'libb.so.1', 'libnone.so'),
        'usr/lib/x86_64-linux-gnu/liba.so': library('libc.so', 'libb.so.1'),
        'usr/lib/libb.so.1': '->libb.so.1.2',
        'usr/lib/libb.so.1.2': library('ld-linux-x86-64.so.2', 'liba.so'),
        'lib64/libc.so': library(),
        'usr/lib/other.so': library(),
      });
      expect(await found([image], { Cmd: ['app'], Env: ['PATH=/nowhere:/bin'] })).toEqual([
        '/etc/passwd',
        '/usr/bin/app',
        INTERPRETER,
        '/usr/lib/x86_64-linux-gnu/liba.so',
        '/usr/lib/libb.so.1.2',
        '/lib64/libc.so',
      ]);
    });

    it('come from the topmost layer that has them, and not from behind whiteouts', async () => {
      const low = await layer({
        ...LOADER,
        'app/run': program('liba.so', 'libb.so', 'libc.so'),
        'usr/lib/liba.so': library(),
        'usr/lib/libb.so': library(),
        'lib/libc.so': library(),
        'lib/libb.so': library(),
      });
      const high = await layer({
        'usr/lib/liba.so': library(),
        'usr/lib/libb.so': null,
        [`lib/${OPAQUE}`]: '',
        'lib/else': 'x',
      });
      expect(await found([low, high], { Entrypoint: ['/app/run'] })).toEqual([
        '0/app/run',
        `0${INTERPRETER}`,
        '1/usr/lib/liba.so',
      ]);
      expect(await found([low], { Entrypoint: ['run'], WorkingDir: '/app' })).toEqual([]);
      expect(await found([low], { Entrypoint: ['./run'], WorkingDir: '/app' })).toContain('/lib/libb.so');
    });

    it('are found by run paths, the library path, the noted libraries and musl’s directories', async () => {
      const elf = (runpath: string): Buffer =>
        handMadeElf({ interpreter: INTERPRETER, needed: ['liba.so', 'libb.so'], runpath });
      const image = await layer({
        ...LOADER,
        'opt/bin/app': elf('$ORIGIN/../lib:relative'),
        'opt/lib/liba.so': library(),
        'own/libb.so': library(),
        'usr/lib/liba.so': library(),
        'opt/bin/musl': handMadeElf({
          interpreter: '/lib/ld-musl-x86_64.so.1',
          needed: ['libm.so', 'libc.musl-x86_64.so.1'],
        }),
        'lib/ld-musl-x86_64.so.1': library(),
        'lib/libc.musl-x86_64.so.1': '->ld-musl-x86_64.so.1',
        'usr/local/lib/libm.so': library(),
      });
      expect(await found([image], { Cmd: ['/opt/bin/app'], Env: ['LD_LIBRARY_PATH=/own'] })).toEqual([
        '/opt/bin/app',
        INTERPRETER,
        '/opt/lib/liba.so',
        '/own/libb.so',
      ]);
      expect(await found([image], { Cmd: ['/opt/bin/musl'] })).toEqual([
        '/opt/bin/musl',
        '/lib/ld-musl-x86_64.so.1',
        '/usr/local/lib/libm.so',
      ]);
    });

    it('pass over libraries of another architecture, and what is no library', async () => {
      const image = await layer({
        ...LOADER,
        app: program('liba.so', 'libb.so'),
        'lib/x86_64-linux-gnu/liba.so': handMadeElf({ bits: 32, machine: 3, needed: ['never.so'] }),
        'lib/liba.so': library(),
        'lib/libb.so': 'a linker script',
      });
      const files = await found([image], { Cmd: ['/app'] });
      expect(files).toContain('/lib/liba.so');
      expect(files.indexOf('/lib/liba.so')).toBeGreaterThan(files.indexOf('/lib/x86_64-linux-gnu/liba.so'));
    });

    it('are of all programs that begin one another', async () => {
      const image = await layer({
        ...LOADER,
        'entry.sh': '#!/usr/bin/env bash\nexec "$@"\n',
        'usr/bin/env': program('libenv.so'),
        'usr/bin/bash': program('libbash.so'),
        'usr/bin/server': program('libserver.so'),
        'usr/bin/sh': '->bash',
        'usr/lib/libenv.so': library(),
        'usr/lib/libbash.so': library(),
        'usr/lib/libserver.so': library(),
        loop: '#!/loop\n',
      });
      const files = await found([image], { Entrypoint: ['/entry.sh'], Cmd: ['server', '--port', '80'] });
      for (const name of [
        '/entry.sh',
        '/usr/bin/env',
        '/usr/bin/bash',
        '/usr/bin/server',
        '/usr/lib/libserver.so',
      ]) {
        expect(files).toContain(name);
      }
      expect(await found([image], { Cmd: ['/usr/bin/sh', '-c', 'exec server'] })).toContain(
        '/usr/lib/libserver.so',
      );
      expect(await found([image], { Cmd: ['/loop'] })).toEqual(['/loop']);
      expect(await found([image], { Cmd: ['absent'] })).toEqual([]);
    });

    it('are bounded, and end with loops of links', async () => {
      const names = Array.from({ length: 400 }, (_, n) => `lib${n}.so`);
      const image = await layer({
        ...LOADER,
        app: program(...names),
        'usr/lib': '->lib',
        round: '->round',
        a: '->b',
        b: '->a/c',
        ...Object.fromEntries(names.map((name) => [`lib/${name}`, library(...names)])),
      });
      expect((await found([image], { Cmd: ['/app'] })).length).toBe(256);
      expect((await found([image], { Cmd: ['/app'] }, 100_000)).length).toBeLessThan(30);
      for (const name of ['/round', '/a', '/usr/lib/x', '/../../app/', '/app/x']) {
        expect(await found([image], { Cmd: [name] }), name).toEqual(
          name === '/../../app/' ? expect.anything() : [],
        );
      }
    });
  },
);

/** What ld.so itself would load, and where that is when no link is left in its path. */
function loadedBy(file: string): string[] {
  const shown = execFileSync('ldd', [file], { encoding: 'utf8' });
  const paths = [...shown.matchAll(/(?:=> )?(\/\S+) \(0x/g)].map(([, name = '']) => name);
  return [...new Set(paths.map((name) => realpathSync(name)))].sort();
}

describe.skipIf(!has('mkfs.erofs') || !has('ldd'))('the libraries of programs of this machine', () => {
  const programs = ['/bin/bash', '/usr/bin/python3', '/usr/bin/git', '/usr/bin/ssh', '/usr/bin/perl'];
  it.each(
    programs
      .filter((name) => existsSync(name))
      .flatMap(
        (name) =>
          [
            [name, 'stored', []],
            [name, 'compressed', ['-zlz4hc', '-C65536']],
          ] as const,
      ),
  )('are those that ldd tells of %s, %s', async (name, _how, options) => {
    const real = realpathSync(name);
    const libraries = loadedBy(real);
    const tree = path.join(directory, 'root');
    const copy = (file: string): void => {
      mkdirSync(path.dirname(path.join(tree, file)), { recursive: true });
      copyFileSync(file, path.join(tree, file));
    };
    mkdirSync(path.join(tree, 'usr/lib'), { recursive: true });
    for (const link of ['lib', 'lib64']) {
      if (realpathSync(`/${link}`) !== `/${link}`)
        symlinkSync(realpathSync(`/${link}`).slice(1), path.join(tree, link));
    }
    const noted = '/etc/ld.so.cache';
    for (const file of [real, ...libraries, ...(existsSync(noted) ? [noted] : [])]) copy(file);
    // By the names under which they are asked for.
    for (const [, soname = '', file = ''] of execFileSync('ldd', [real], { encoding: 'utf8' }).matchAll(
      /(\S+) => (\/\S+) \(0x/g,
    )) {
      const link = path.join(tree, path.dirname(realpathSync(file)), soname);
      if (!existsSync(link)) symlinkSync(path.basename(realpathSync(file)), link);
    }
    const interpreter =
      [...execFileSync('ldd', [real], { encoding: 'utf8' }).matchAll(/^\s*(\/\S+) \(0x/gm)][0]?.[1] ?? '';
    const place = path.join(realpathSync(path.dirname(interpreter)), path.basename(interpreter));
    if (!existsSync(path.join(tree, place))) {
      mkdirSync(path.join(tree, path.dirname(place)), { recursive: true });
      symlinkSync(realpathSync(interpreter), path.join(tree, place));
    }
    const files = await found([await imageOf(tree, options)], { Cmd: [real] });
    expect(files.filter((file) => file !== real && file !== noted).sort()).toEqual(libraries);
  });
});
