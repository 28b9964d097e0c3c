/**
 * Reads a blob at random through a cache that is far smaller than it, until it is killed; writes a byte to standard output
 * whenever something was evicted. Arguments: directory, digest, blob size, span size, seed.
 */
import { silentLogger } from '../../../daemon/log.js';
import { CacheSpace } from '../cache-space.js';
import { CacheReader } from '../cache.js';
import { ScriptedReader, seeded } from './scripted-reader.js';

const [dir = '', digest = '', size = '', spanSize = '', seed = ''] = process.argv.slice(2);
const random = seeded(Number(seed));
const space = new CacheSpace({
  dir,
  maxBytes: Number(size) / 4,
  minFreeBytes: 0,
  keepUnusedMs: 3_600_000,
  youngestSeconds: 0,
  log: silentLogger,
});
await space.start();
const next = new ScriptedReader(Number(size), 'at once');
const reader = await CacheReader.open(next, {
  dir,
  digest,
  spanSize: Number(spanSize),
  space,
  log: silentLogger,
});
for (let reads = 1; ; reads++) {
  const offset = Math.floor(random() * Number(size));
  await reader.read(Buffer.alloc(Math.min(100_000, Number(size) - offset)), offset);
  if (reads % 8 !== 0) continue;
  const before = reader.statistics.cachedBytes;
  await space.pass();
  if (reader.statistics.cachedBytes < before) process.stdout.write('.');
}
