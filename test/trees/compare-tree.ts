/**
 * Compares a mounted tree with trees in files, in a process of its own: one that hangs on a mount can be ended.
 *
 *     node dist/test/trees/compare-tree.js ROOT IGNORED,FIELDS TREE-FILE...
 *
 * The last line says in JSON how many entries there are, and the differences from each file.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { compareTrees, readTree, type TreeEntry } from '../tree.js';
import { isTreeFile, readTreeFile } from './tree-file.js';

/** What is printed. */
export interface TreeComparison {
  readonly entries: number;
  /** By name of the tree file, at most 20 for each. */
  readonly differences: Readonly<Record<string, readonly string[]>>;
}

const [, , root = '', ignored = '', ...files] = process.argv;
const ignore = ignored.split(',').filter(Boolean) as (keyof TreeEntry)[];
// One file after the other, each waited for, is most of the time where a device takes long to answer: the kernel has all of
// them afterwards. What cannot be read is found below.
const several = 'find "$1" -type f -print0 | xargs -0 -n 200 -P 8 cat >/dev/null 2>&1 || true';
execFileSync('sh', ['-c', several, 'sh', root], { stdio: 'ignore' });
const tree = readTree(root);
const differences: Record<string, readonly string[]> = {};
for (const [number, file] of files.entries()) {
  // What other programs make of a layer is the same, as a rule.
  const same = files.slice(0, number).find((other) => readFileSync(other).equals(readFileSync(file)));
  const known = same === undefined ? undefined : differences[path.basename(same)];
  differences[path.basename(file)] =
    known ?? ((await isTreeFile(file, tree)) ? [] : compareTrees(await readTreeFile(file), tree, { ignore }));
}
console.log(JSON.stringify({ entries: tree.size, differences } satisfies TreeComparison));
