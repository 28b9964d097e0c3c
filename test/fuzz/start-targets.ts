/** Hostile programs, lists of libraries, and layers in which they are looked for. */
import { execFileSync } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { crc32c } from '../../blobserve/layer/erofs/crc32c.js';
import { ErofsTree } from '../../blobserve/layer/erofs/tree-reader.js';
import { ErofsFormatError } from '../../blobserve/layer/erofs/super-block.js';
import { ElfError } from '../../blobserve/start/elf.js';
import { HEAD_SIZE, readElf } from '../../blobserve/start/elf-file.js';
import { ImageTree } from '../../blobserve/start/image-tree.js';
import { parseLibraryCache } from '../../blobserve/start/library-cache.js';
import { startCommand } from '../../blobserve/start/start-command.js';
import { startFiles } from '../../blobserve/start/start-files.js';
import { handMadeElf } from '../../blobserve/start/testing/hand-made-elf.js';
import { mutate, picker } from './mutation.js';
import { attemptAsync, must } from './outcome.js';

const INTERPRETER = '/lib/ld.so';

export async function elf(seed: number): Promise<void> {
  const pick = picker(seed);
  const whole = handMadeElf({
    bits: pick(2) ? 32 : 64,
    littleEndian: pick(2) > 0,
    interpreter: INTERPRETER,
    needed: Array.from({ length: pick(pick(10) ? 6 : 600) }, (_, n) => `lib${n}.so`),
    ...(pick(2) && { rpath: '$ORIGIN' }),
    ...(pick(2) && { runpath: '/a:/b' }),
    debug: pick(9000),
  });
  const bytes = mutate(whole, pick, false, 0, pick(2) ? 300 : whole.length);
  let reads = 0;
  const outcome = await attemptAsync(
    () =>
      readElf(bytes.subarray(0, HEAD_SIZE), bytes.length, (offset, length) => {
        reads++;
        must(offset >= 0 && length >= 0 && offset + length <= bytes.length, `${length} bytes at ${offset}`);
        return Promise.resolve(bytes.subarray(offset, offset + length));
      }),
    ElfError,
  );
  must(reads < 1200, `${reads} reads`);
  if ('value' in outcome) {
    must(outcome.value.loaded <= bytes.length, `${outcome.value.loaded} of ${bytes.length} bytes are loaded`);
    must(
      outcome.value.needed.every((name) => name.length < 4096),
      'a name of more than 4096 bytes',
    );
  }
  for (const [name, files] of parseLibraryCache(mutate(someLibraryCache(), pick))) {
    must(
      name !== '' && files.length <= 8 && files.every((file) => file.startsWith('/')),
      `${name}: ${files.join()}`,
    );
  }
}

function someLibraryCache(): Buffer {
  const names = ['liba.so', '/lib/liba.so', 'libb.so.1', '/usr/lib/libb.so.1'];
  const strings = Buffer.from(names.map((name) => `${name}\0`).join(''));
  const bytes = Buffer.alloc(48 + 2 * 24);
  bytes.write('glibc-ld.so.cache1.1');
  bytes.writeUInt32LE(2, 20);
  const placeOf = (name: string): number => bytes.length + strings.indexOf(`${name}\0`);
  for (const [n, name] of ['liba.so', 'libb.so.1'].entries()) {
    bytes.writeUInt32LE(placeOf(name), 48 + n * 24 + 4);
    bytes.writeUInt32LE(placeOf(name.includes('a') ? '/lib/liba.so' : '/usr/lib/libb.so.1'), 48 + n * 24 + 8);
  }
  return Buffer.concat([bytes, strings]);
}

/** Images of mkfs.erofs, made once for each run. */
const images = new Map<string, readonly Buffer[]>();

function someImages(scratch: string): readonly Buffer[] {
  const known = images.get(scratch);
  if (known !== undefined) return known;
  const tree = path.join(scratch, 'tree');
  for (const directory of ['lib', 'etc', 'bin', 'usr/lib'])
    mkdirSync(path.join(tree, directory), { recursive: true });
  const files: Record<string, Buffer | string> = {
    'bin/app': handMadeElf({ interpreter: INTERPRETER, needed: ['liba.so', 'libb.so'], debug: 50_000 }),
    'bin/entry': '#!/bin/app\n',
    'lib/ld.so': handMadeElf({ debug: 10_000 }),
    'lib/liba.so.1': handMadeElf({ needed: ['libb.so'], debug: 20_000 }),
    'usr/lib/libb.so': handMadeElf({}),
    'etc/passwd': 'root:x:0:0\n'.repeat(1000),
    'etc/ld.so.cache': someLibraryCache(),
  };
  for (const [name, content] of Object.entries(files)) {
    writeFileSync(path.join(tree, name), content);
    chmodSync(path.join(tree, name), 0o755);
  }
  symlinkSync('liba.so.1', path.join(tree, 'lib/liba.so'));
  for (let n = 0; n < 300; n++) writeFileSync(path.join(tree, 'lib', `other-${n}`), '');
  const all = [
    [],
    ['-zlz4hc'],
    ['-zlz4', '-C65536', '-Elegacy-compress'],
    ['-zlz4', '-Eztailpacking'],
    ['--chunksize=4096'],
  ];
  const made = all.map((options, n) => {
    const image = path.join(scratch, `image-${n}`);
    if (!existsSync(image)) execFileSync('mkfs.erofs', ['--quiet', '-T0', ...options, image, tree]);
    return readFileSync(image);
  });
  images.set(scratch, made);
  return made;
}

export async function imageTree(seed: number, scratch: string): Promise<void> {
  const pick = picker(seed);
  const some = someImages(scratch);
  let [reads, bytesRead] = [0, 0];
  const open = async (image: Buffer): Promise<ErofsTree> => {
    // Behind the super block, so that it is not that which is refused.
    const bytes = mutate(image, pick, true, pick(8) ? 1152 : 1024, pick(2) ? 20_000 : image.length);
    bytes.writeUInt32LE(checksumOf(bytes), 1024 + 4);
    return ErofsTree.open((offset, length) => {
      reads++;
      bytesRead += length;
      must(offset >= 0 && length >= 0 && offset + length <= bytes.length, `${length} bytes at ${offset}`);
      return Promise.resolve(Buffer.from(bytes.subarray(offset, offset + length)));
    }, bytes.length);
  };
  const trees: ErofsTree[] = [];
  for (let n = 0; n < 2; n++) {
    const outcome = await attemptAsync(
      () => open(some[pick(some.length)] ?? Buffer.alloc(0)),
      ErofsFormatError,
    );
    if ('value' in outcome) trees.push(outcome.value);
  }
  const command = startCommand({ config: { Entrypoint: ['/bin/entry'], Cmd: ['app'] } });
  if (command === undefined || trees.length === 0) return;
  let told = 0;
  await startFiles({
    tree: new ImageTree(trees),
    command,
    maxBytes: 2 ** 26,
    found: (files) => (told += files.reduce((sum, { length }) => sum + length, 0)),
  });
  must(told <= 2 ** 26, `${told} bytes are wanted`);
  must(reads < 20_000 && bytesRead < 2 ** 30, `${reads} reads of ${bytesRead} bytes`);
}

/** Of blocks of 4096 bytes, which mkfs.erofs makes. */
function checksumOf(bytes: Buffer): number {
  const crc = crc32c(Buffer.alloc(4), crc32c(bytes.subarray(1024, 1028)));
  return crc32c(bytes.subarray(1032, 4096), crc);
}
