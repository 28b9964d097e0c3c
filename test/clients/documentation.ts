/**
 * Configurations of docs/clients, as a user would paste them.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { expect } from 'vitest';
import { checkout } from '../debian/packages.js';
import { architecture } from '../image/oci-layout.js';
import type { ProxyPlugin } from '../stack/containerd.js';

/** The first block of TOML of a page, with the paths of a private node. */
export async function documented(page: string): Promise<(plugin: ProxyPlugin) => string> {
  const text = await readFile(path.join(checkout, 'docs', 'clients', page), 'utf8');
  const [, block = ''] = /^```toml\n([\s\S]*?)^```$/m.exec(text) ?? [];
  expect(block).toContain('/run/erofs-nbd/snapshotter.sock');
  return ({ address, root }) =>
    block
      .replaceAll('/run/erofs-nbd/snapshotter.sock', address)
      .replaceAll('/var/lib/erofs-nbd', root)
      .replaceAll('linux/amd64', `linux/${architecture()}`);
}
