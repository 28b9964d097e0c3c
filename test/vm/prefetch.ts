/**
 * Fetches and builds what the tests need that run in the test machine, which has no network: programs and images.
 * Of the layers of test/trees those that `TREES` names, the large ones as a node has them that had all of them.
 */
import { buildGoPrograms } from '../conformance/go-programs.js';
import { mountErofs } from '../debian/mount-erofs.js';
import { containerdFrom, ctrRemoteProgram, program, sociProgram } from '../debian/packages.js';
import { fetchErofsUtils } from '../erofs-utils.js';
import { buildDebianImage } from '../image/debian-image.js';
import { buildTinyImage } from '../image/tiny-image.js';
import { buildRealLayer, chosenLayers, prepareForNode } from '../trees/real-layers.js';

await containerdFrom('sid');
for (const name of ['runc', 'docker-registry', 'mkfs.erofs', 'busybox', 'setfattr'] as const)
  await program(name);
// The kinds of layers that test/system asks for.
for (const format of ['erofs', 'erofs-lz4hc', 'tar', 'tar+gzip'] as const) await buildTinyImage({ format });
// Compiled outside, where it takes a minute.
if (process.env['EROFS_NBD_VM_CONFORMANCE'] === 'yes') await buildGoPrograms();
// What the crash test has a container read.
if (process.env['EROFS_NBD_VM_CRASH'] === 'yes') await buildDebianImage({ format: 'erofs' });
// What makes the indexes of test/system/index-sources.test.ts.
await sociProgram();
await ctrRemoteProgram();
fetchErofsUtils();
await mountErofs();
for (const name of chosenLayers(process.env['TREES'] ?? 'small')) {
  const layer = await buildRealLayer(name);
  if (name === 'many' || name === 'large') await prepareForNode(layer);
}
