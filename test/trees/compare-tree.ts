/**
 * Compares a mounted tree with trees in files, in a process of its own: one that hangs on a mount can be ended.
 *
 *     node dist/test/trees/compare-tree.js ROOT IGNORED,FIELDS TREE-FILE...
 *
 * The last line says in JSON how many entries there are, and the differences from each file.
 */
import path from 'node:path';
import { compareTrees, readTree, type TreeEntry } from '../tree.js';
import { readTreeFile } from './tree-file.js';

/** What is printed. */
export interface TreeComparison {
  readonly entries: number;
  /** By name of the tree file, at most 20 for each. */
  readonly differences: Readonly<Record<string, readonly string[]>>;
}

const [, , root = '', ignored = '', ...files] = process.argv;
const ignore = ignored.split(',').filter(Boolean) as (keyof TreeEntry)[];
const tree = readTree(root);
const differences: Record<string, readonly string[]> = {};
for (const file of files) {
  differences[path.basename(file)] = compareTrees(await readTreeFile(file), tree, { ignore });
}
console.log(JSON.stringify({ entries: tree.size, differences } satisfies TreeComparison));
