/**
 * Fetches and builds what the tests need that run in the test machine, which has no network: programs and images.
 */
import { buildTinyImage } from '../image/tiny-image.js';
import { containerdFrom, program } from '../debian/packages.js';

await containerdFrom('sid');
for (const name of ['runc', 'docker-registry', 'mkfs.erofs', 'busybox', 'setfattr'] as const)
  await program(name);
// The kinds of layers that test/system asks for.
for (const format of ['erofs', 'erofs-lz4hc', 'tar', 'tar+gzip'] as const) await buildTinyImage({ format });
