import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ErofsFormatError } from './super-block.js';
import { ErofsTree } from './tree-reader.js';

const hasMkfs = (() => {
  try {
    execFileSync('sh', ['-c', 'command -v mkfs.erofs']);
    return true;
  } catch {
    return false;
  }
})();

/** Text that compresses, with stretches that do not, so that there are clusters of both kinds. */
function mixed(length: number): Buffer {
  const parts: Buffer[] = [];
  for (let at = 0, n = 0; at < length; n++) {
    const part =
      n % 3 === 0 ? randomBytes(9_001) : Buffer.from(`line ${n} of a text that goes on\n`.repeat(700));
    parts.push(part);
    at += part.length;
  }
  return Buffer.concat(parts).subarray(0, length);
}

let directory: string;
const files = new Map<string, Buffer>([
  ['empty', Buffer.alloc(0)],
  ['small', Buffer.from('a few bytes\n')],
  ['block', mixed(4096)],
  ['text', Buffer.from('all the same '.repeat(40_000))],
  ['mixed', mixed(1_234_567)],
  ['random', randomBytes(300_001)],
]);

/** @param asked is told of every read */
function treeOf(bytes: Buffer, asked: [number, number][]): Promise<ErofsTree> {
  return ErofsTree.open((offset, length) => {
    asked.push([offset, length]);
    return Promise.resolve(Buffer.from(bytes.subarray(offset, offset + length)));
  }, bytes.length);
}

function make(options: readonly string[]): Buffer {
  const image = path.join(directory, 'image');
  rmSync(image, { force: true });
  execFileSync('mkfs.erofs', ['--quiet', '-T0', ...options, image, path.join(directory, 'tree')]);
  return readFileSync(image);
}

describe.skipIf(!hasMkfs)('a tree that mkfs.erofs made', () => {
  beforeAll(() => {
    directory = mkdtempSync(path.join(tmpdir(), 'erofs-tree-'));
    const tree = path.join(directory, 'tree');
    mkdirSync(path.join(tree, 'many'), { recursive: true });
    for (const [name, bytes] of files) writeFileSync(path.join(tree, name), bytes);
    for (let n = 0; n < 1500; n++) writeFileSync(path.join(tree, 'many', `name-${n * 7}`), `${n}`);
    symlinkSync('many/name-7', path.join(tree, 'link'));
  });
  afterAll(() => rmSync(directory, { recursive: true, force: true }));

  it.each<[string, readonly string[]]>([
    ['as it is', []],
    ['with data behind its inodes never', ['-Enoinline_data']],
    ['in chunks', ['--chunksize=65536']],
    ['compressed', ['-zlz4hc']],
    ['in large clusters', ['-zlz4hc', '-C65536']],
    ['with the older table of clusters', ['-zlz4', '-Elegacy-compress']],
    ['with the older table and large clusters', ['-zlz4', '-Elegacy-compress', '-C65536']],
    ['with ends of files behind their inodes', ['-zlz4hc', '-Eztailpacking']],
  ])('gives names, links and bytes of an image %s', async (_name, options) => {
    const asked: [number, number][] = [];
    const tree = await treeOf(make(options), asked);
    const root = await tree.root();
    for (const [name, content] of files) {
      const file = await tree.lookup(root, name);
      if (file === undefined) throw new Error(`${name} is not found`);
      expect(file.size).toBe(content.length);
      const whole = await tree.read(file, 0, content.length + 10);
      expect(whole.equals(content), `${name} as a whole`).toBe(true);
      for (let at = 1; at < content.length; at += 91_357) {
        const part = await tree.read(file, at, 5_000);
        expect(part.equals(content.subarray(at, at + 5_000)), `${name} at ${at}`).toBe(true);
      }
      // What is read of the image, once the place of the data is known, is what is said to be that place.
      const parts = await tree.parts(file, 0, content.length);
      asked.length = 0;
      await tree.read(file, 0, content.length);
      for (const [offset, length] of asked) {
        const inside = parts.some(
          (part) => part.offset <= offset && offset + length <= part.offset + part.length,
        );
        expect(inside, `${name}: ${length} bytes at ${offset} are in ${JSON.stringify(parts)}`).toBe(true);
      }
      expect(asked.length > 0).toBe(content.length > 0);
    }
    const many = await tree.lookup(root, 'many');
    if (many === undefined) throw new Error('many is not found');
    for (const n of [0, 1, 300, 749, 1498, 1499]) {
      const file = await tree.lookup(many, `name-${n * 7}`);
      expect(file && (await tree.read(file, 0, 10)).toString()).toBe(String(n));
    }
    for (const absent of ['name-1', 'a', 'zzz', 'name-', '']) {
      expect(await tree.lookup(many, absent)).toBeUndefined();
    }
    const link = await tree.lookup(root, 'link');
    expect(link && (await tree.readLink(link))).toBe('many/name-7');
  });

  it('refuses what reaches outside, and reads a part of a directory to find a name', async () => {
    const asked: [number, number][] = [];
    const tree = await treeOf(make([]), asked);
    const many = await tree.lookup(await tree.root(), 'many');
    if (many === undefined) throw new Error('many is not found');
    asked.length = 0;
    expect(await tree.lookup(many, 'name-2100')).toBeDefined();
    expect(asked.reduce((sum, [, length]) => sum + length, 0)).toBeLessThan(many.size / 2);
    await expect(tree.lookup({ ...many, nid: 2 ** 40 }, 'x')).rejects.toThrow(ErofsFormatError);
    await expect(tree.lookup({ ...many, nid: -1 }, 'x')).rejects.toThrow(ErofsFormatError);
  });
});
