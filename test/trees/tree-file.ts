/** Trees kept in files, so that one is read on one machine and compared on another: a line of JSON for each entry. */
import { createReadStream } from 'node:fs';
import { open } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import type { Tree, TreeEntry } from '../tree.js';

export async function writeTree(file: string, tree: Tree): Promise<void> {
  const handle = await open(file, 'w');
  try {
    let lines: string[] = [];
    for (const [path, { mtimeNs, ...entry }] of tree) {
      lines.push(JSON.stringify([path, String(mtimeNs), entry]));
      if (lines.length < 1000) continue;
      await handle.appendFile(`${lines.join('\n')}\n`);
      lines = [];
    }
    await handle.appendFile(lines.map((line) => `${line}\n`).join(''));
  } finally {
    await handle.close();
  }
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
