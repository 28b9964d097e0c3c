/** Trees kept in files, so that one is read on one machine and compared on another: a line of JSON for each entry. */
import { createReadStream } from 'node:fs';
import { open } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import type { Tree, TreeEntry } from '../tree.js';

export async function writeTree(file: string, tree: Tree): Promise<void> {
  const handle = await open(file, 'w');
  try {
    let lines: string[] = [];
    for (const [path, entry] of tree) {
      lines.push(lineOf(path, entry));
      if (lines.length < 1000) continue;
      await handle.appendFile(`${lines.join('\n')}\n`);
      lines = [];
    }
    await handle.appendFile(lines.map((line) => `${line}\n`).join(''));
  } finally {
    await handle.close();
  }
}

function lineOf(path: string, { mtimeNs, ...entry }: TreeEntry): string {
  return JSON.stringify([path, String(mtimeNs), entry]);
}

/** Whether the file is what `writeTree` would make of the tree: much faster to find out than how they differ. */
export async function isTreeFile(file: string, tree: Tree): Promise<boolean> {
  const entries = tree[Symbol.iterator]();
  for await (const line of createInterface({ input: createReadStream(file) })) {
    const next = entries.next();
    if (next.done === true || lineOf(...next.value) !== line) return false;
  }
  return entries.next().done === true;
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
