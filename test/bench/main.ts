/**
 * `npm run bench -- NAME [ARGUMENT...]`: runs one benchmark. Each is a file beside this one, entered in the list below; it
 * prints a table, and one line of JSON at the end.
 */
import { cachedReadBenchmark } from './cached-read.js';
import { coldstart } from './coldstart.js';
import { gunzip } from './gunzip.js';
import { index } from './index.js';
import { link } from './link.js';
import { memory } from './memory.js';
import { recovery } from './recovery.js';
import { rpc } from './rpc.js';
import { serve } from './serve.js';

const BENCHMARKS: Record<string, ((arguments_: string[]) => Promise<void>) | undefined> = {
  'cached-read': cachedReadBenchmark,
  coldstart,
  gunzip,
  index,
  link,
  memory,
  recovery,
  rpc,
  serve,
  snapshots: rpc,
};

const [, , name = '', ...rest] = process.argv;
const benchmark = Object.hasOwn(BENCHMARKS, name) ? BENCHMARKS[name] : undefined;
if (benchmark === undefined) {
  console.error(`usage: npm run bench -- ${Object.keys(BENCHMARKS).join('|')} [ARGUMENT...]`);
  process.exit(2);
}
await benchmark(rest);
