/**
 * Fills a cache in random order until it is killed; writes a byte to standard output whenever something is marked.
 * Arguments: directory, digest, blob size, span size, seed.
 */
import { silentLogger } from '../../../daemon/log.js';
import { CacheReader } from '../cache.js';
import { ScriptedReader, seeded } from './scripted-reader.js';

const [dir = '', digest = '', size = '', spanSize = '', seed = ''] = process.argv.slice(2);
const random = seeded(Number(seed));
const next = new ScriptedReader(Number(size), (request) => {
  request.deliver(Math.floor(request.length / 2));
  setImmediate(() => request.finish());
});
const reader = await CacheReader.open(next, { dir, digest, spanSize: Number(spanSize), log: silentLogger });
for (let reads = 1; ; reads++) {
  const offset = Math.floor(random() * Number(size));
  await reader.read(Buffer.alloc(Math.min(100_000, Number(size) - offset)), offset);
  if (reads % 4 !== 0) continue;
  await reader.settled();
  process.stdout.write('.');
}
