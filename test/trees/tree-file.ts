/** Trees kept in files, so that one is read on one machine and compared on another: a line of JSON for each entry. */
import { createReadStream } from 'node:fs';
import { open, readFile } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import type { Tree, TreeEntry } from '../tree.js';

export async function writeTree(file: string, tree: Tree): Promise<void> {
  const handle = await open(file, 'w');
  try {
    for (const lines of linesOf(tree)) await handle.appendFile(lines);
  } finally {
    await handle.close();
  }
}

/** The lines of a tree, some at a time. */
function* linesOf(tree: Tree): Generator<string> {
  let lines: string[] = [];
  for (const [path, entry] of tree) {
    lines.push(`${lineOf(path, entry)}\n`);
    if (lines.length < 1000) continue;
    yield lines.join('');
    lines = [];
  }
  yield lines.join('');
}

function lineOf(path: string, { mtimeNs, ...entry }: TreeEntry): string {
  return JSON.stringify([path, String(mtimeNs), entry]);
}

/** Whether the file is what `writeTree` would make of the tree: much faster to find out than how they differ. */
export async function isTreeFile(file: string, tree: Tree): Promise<boolean> {
  const written = await readFile(file);
  let at = 0;
  for (const lines of linesOf(tree)) {
    const bytes = Buffer.from(lines);
    if (!written.subarray(at, at + bytes.length).equals(bytes)) return false;
    at += bytes.length;
  }
  return at === written.length;
}

/** @throws when the file is not there or not whole */
export async function readTreeFile(file: string): Promise<Tree> {
  const tree = new Map<string, TreeEntry>();
  for await (const line of createInterface({ input: createReadStream(file) })) {
    const [path, mtimeNs, entry] = JSON.parse(line) as [string, string, Omit<TreeEntry, 'mtimeNs'>];
    tree.set(path, { ...entry, mtimeNs: BigInt(mtimeNs) });
  }
  return tree;
}
