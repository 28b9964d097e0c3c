/**
 * Configurations of docs/clients, as a user would paste them.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { expect } from 'vitest';
import { checkout } from '../debian/packages.js';
import { architecture } from '../image/oci-layout.js';
import type { ProxyPlugin } from '../stack/containerd.js';

/**
 * The first block of TOML of a page, with the paths of a private node.
 *
 * @param some what is in the block of the page for Kubernetes that is to be taken in place of "Kubernetes only"
 */
export async function documented(page: string, some?: string): Promise<(plugin: ProxyPlugin) => string> {
  const [first = ''] = await blocksOf(page);
  expect(first).toContain('/run/erofs-nbd/snapshotter.sock');
  const wanted = (await blocksOf('kubernetes.md')).filter(
    (block) => some !== undefined && block.includes(some),
  );
  expect(wanted).toHaveLength(some === undefined ? 0 : 1);
  const [kept = ''] = some === undefined ? [first] : first.split('# Kubernetes only');
  const pasted = [kept, ...wanted].join('\n');
  return ({ address, root }) =>
    pasted
      .replaceAll('/run/erofs-nbd/snapshotter.sock', address)
      .replaceAll('/var/lib/erofs-nbd', root)
      .replaceAll('linux/amd64', `linux/${architecture()}`);
}

/** The only block of JSON of a page. */
export async function documentedJson(page: string): Promise<Record<string, unknown>> {
  const blocks = await blocksOf(page, 'json');
  expect(blocks).toHaveLength(1);
  return JSON.parse(blocks[0] ?? '') as Record<string, unknown>;
}

/** What tells whether a pull was lazy: snapshots, contents, mounts, status. */
export async function lookingCommands(): Promise<string[]> {
  const [block = ''] = await blocksOf('README.md', 'sh');
  const commands = block.trimEnd().split('\n');
  expect(commands).toHaveLength(4);
  return commands;
}

async function blocksOf(page: string, language = 'toml'): Promise<string[]> {
  const text = await readFile(path.join(checkout, 'docs', 'clients', page), 'utf8');
  return [...text.matchAll(new RegExp(`^\`\`\`${language}\\n([\\s\\S]*?)^\`\`\`$`, 'gm'))].map(
    ([, block = '']) => block,
  );
}
