/** Comparisons in processes of their own, each with a time limit: what they look at may hang. */
import path from 'node:path';
import { execa } from 'execa';
import { checkout } from '../debian/packages.js';
import { patience } from '../patience.js';
import type { DeviceComparison } from './compare-device.js';
import type { TreeComparison } from './compare-tree.js';

/** Enough for a gigabyte on a slow machine. */
const LIMIT = patience(300_000);

async function run(program: string, parameters: readonly string[]): Promise<unknown> {
  const file = path.join(checkout, 'dist', 'test', 'trees', program);
  const { stdout } = await execa(process.execPath, [file, ...parameters], {
    timeout: LIMIT,
    killSignal: 'SIGKILL',
  });
  return JSON.parse(stdout.trimEnd().split('\n').at(-1) ?? '');
}

/**
 * @param root of the mounted tree
 * @param files trees that it has to be equal to (tree-file.ts)
 * @param ignore fields that may differ
 */
export async function compareMountedTree(
  root: string,
  files: readonly string[],
  ignore: readonly string[] = [],
): Promise<TreeComparison> {
  return (await run('compare-tree.js', [root, ignore.join(','), ...files])) as TreeComparison;
}

/** @param device of a tar.gz layer whose index files and tar are given */
export async function compareDevice(
  device: string,
  index: { readonly tarindex: string; readonly checkpoints: string },
  tar: string,
): Promise<DeviceComparison> {
  return (await run('compare-device.js', [
    device,
    index.tarindex,
    index.checkpoints,
    tar,
    '7',
  ])) as DeviceComparison;
}
