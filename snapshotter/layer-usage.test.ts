import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { expect, it } from 'vitest';
import { layout } from '../daemon/layout.js';
import { layerUsage } from './layer-usage.js';

it('counts the blocks of a layer that are on the disk, not what its blob would take', async () => {
  const root = mkdtempSync('/var/tmp/erofs-nbd-usage-');
  try {
    const places = layout(root);
    const hex = 'ab'.repeat(32);
    expect(await layerUsage(places, `sha256:${hex}`)).toEqual({ size: 0, inodes: 0 });
    for (const directory of [places.cache, places.index, places.digests]) {
      mkdirSync(path.join(directory, 'sha256'), { recursive: true });
    }
    const data = path.join(places.cache, 'sha256', `${hex}.data`);
    writeFileSync(data, Buffer.alloc(100_000, 1));
    truncateSync(data, 2 ** 40);
    writeFileSync(path.join(places.cache, 'sha256', `${hex}.map`), Buffer.alloc(5000, 1));
    writeFileSync(path.join(places.index, 'sha256', `${hex}.erofs`), Buffer.alloc(9000, 1));
    writeFileSync(path.join(places.digests, 'sha256', hex), Buffer.alloc(100, 1));
    writeFileSync(path.join(places.cache, 'sha256', `${'cd'.repeat(32)}.data`), Buffer.alloc(100_000, 1));
    const { size, inodes } = await layerUsage(places, `sha256:${hex}`);
    expect(inodes).toBe(4);
    const files = [data, data.replace(/data$/, 'map')].concat(
      path.join(places.index, 'sha256', `${hex}.erofs`),
      path.join(places.digests, 'sha256', hex),
    );
    // du counts the same blocks, in its own program.
    const du = execFileSync('du', ['--block-size=1', '--total', ...files], { encoding: 'utf8' });
    expect(size).toBe(Number(/^(\d+)\ttotal$/m.exec(du)?.[1]));
    expect(size).toBeLessThan(300_000);
  } finally {
    rmSync(root, { recursive: true });
  }
});
