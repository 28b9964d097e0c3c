/**
 * `npm run demo`: a real image in a registry on this machine, containerd with erofs-nbd beside it, and a container that
 * prints its first line when a part of the image is here. Everything is private to the run and gone after it.
 */
import { cp, mkdtemp, readdir } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { isClean, leftovers } from '../test/stack/leftovers.js';
import { Stack } from '../test/stack/stack.js';
import { bold, closingLine, dim, say } from './narration.js';
import { removeAbandonedStacks } from '../test/stack/abandoned.js';
import { PUBLISHED } from './publisher.js';
import { PREFIX, runDemo, type DemoChoices, type DemoResult } from './run-demo.js';

const USAGE = `usage: npm run demo [-- OPTIONS]

  (none)         tar.gz layers, as registries have them, unchanged: a first pull that indexes them, a second from the
                 cache, and a lazy start with the index alone
  --tar          the same with tar layers
  --fresh-node   tar.gz layers on a node that has never seen them, with an index that another machine has published
  --with KIND    with --fresh-node, what was published: "erofs-nbd", the default; "soci", by SOCI's own program; "soci-v2",
                 the same in the form that soci convert gives it; "estargz", no index, but the image converted to eStargz by
                 stargz-snapshotter's own program
  --native       native EROFS layers, compressed with lz4hc: one cold start
  --uncompressed with --native: not compressed
  --overlayfs    containerd's own snapshotter and tar.gz layers, to compare with
  --report FILE  draws what the container has read: an HTML page
  --help         this text`;

function choose(): DemoChoices | undefined {
  const flag = { type: 'boolean', default: false } as const;
  const { values } = parseArgs({
    options: {
      ...{ native: flag, uncompressed: flag, tar: flag, overlayfs: flag, 'fresh-node': flag, help: flag },
      report: { type: 'string' },
      with: { type: 'string' },
    },
  });
  if (values.help) return undefined;
  if (values.native && (values.tar || values.overlayfs))
    throw new Error('--native goes with neither --tar nor --overlayfs');
  const freshNode = values['fresh-node'];
  if (freshNode && (values.native || values.tar || values.overlayfs))
    throw new Error('--fresh-node goes with tar.gz layers alone');
  const published = PUBLISHED.find((kind) => kind === (values.with ?? 'erofs-nbd'));
  if (published === undefined)
    throw new Error(`--with ${values.with ?? ''}: it is one of ${PUBLISHED.join(', ')}`);
  if (values.with !== undefined && !freshNode) throw new Error('--with goes with --fresh-node');
  if (values.report !== undefined && values.overlayfs) throw new Error('--report goes not with --overlayfs');
  if (values.uncompressed && !values.native) throw new Error('--uncompressed goes with --native');
  const native = values.uncompressed ? 'erofs' : 'erofs-lz4hc';
  return {
    format: values.native ? native : values.tar ? 'tar' : 'tar+gzip',
    snapshotter: values.overlayfs ? 'overlayfs' : 'erofs-nbd',
    freshNode,
    published,
    ...(values.report !== undefined && { report: values.report }),
  };
}

/** Keeps what the services said, where it outlives their directory. */
async function keepLogs(directory: string): Promise<string> {
  const kept = await mkdtemp(path.join(os.tmpdir(), 'erofs-nbd-demo-logs-'));
  for (const name of (await readdir(directory)).filter((entry) => /\.(log|toml)$/.test(entry))) {
    await cp(path.join(directory, name), path.join(kept, name));
  }
  return kept;
}

/** Rejects at the first signal that asks to end; a second one while things are put away changes nothing. */
function interruption(): { readonly happens: Promise<never>; readonly signal: AbortSignal } {
  const controller = new AbortController();
  const happens = new Promise<never>((_, reject) => {
    for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
      process.on(name, () => {
        controller.abort();
        reject(new Error(`interrupted by ${name}`));
      });
    }
  });
  return { happens, signal: controller.signal };
}

/** The gist for the closing line: a program's whole complaint has been shown above it. */
function inShort(failure: string): string {
  const lines = failure.split('\n').filter((line) => line.trim() !== '');
  const [first = '', last = ''] = [lines[0], lines.at(-1)];
  return lines.length > 4 ? `${first} … ${last.trim()}` : lines.join('; ');
}

async function main(choices: DemoChoices): Promise<boolean> {
  say();
  say(bold('  erofs-nbd: a container starts before its image is here'));
  say();
  const { happens, signal } = interruption();
  let stack: Stack | undefined;
  let result: DemoResult | undefined;
  let failure: string | undefined;
  let logs: string | undefined;
  const open = async (): Promise<Stack> => {
    await removeAbandonedStacks(PREFIX);
    signal.throwIfAborted();
    stack = await Stack.create(PREFIX);
    return stack;
  };
  try {
    result = await Promise.race([runDemo(choices, open, signal), happens]);
  } catch (error) {
    failure = error instanceof Error ? error.message : String(error);
    if (stack !== undefined && !signal.aborted) {
      logs = await keepLogs(stack.directory);
      // Their directory is about to go: what names a log there means its copy.
      failure = failure.replaceAll(stack.directory, logs);
    }
  }
  if (stack !== undefined) {
    const troubles = await stack.remove();
    const left = await leftovers(stack.directory);
    if (!isClean(left)) troubles.push(`left behind: ${JSON.stringify(left)}`);
    if (troubles.length > 0 && failure === undefined) failure = `could not clean up: ${troubles.join('; ')}`;
  }
  if (failure !== undefined || result === undefined) {
    say();
    for (const line of (failure ?? 'no result').split('\n')) say(`  ${line}`);
    if (logs !== undefined) say(dim(`  logs: ${logs}`));
    say();
    closingLine({ ok: false, error: inShort(failure ?? 'no result'), ...(logs !== undefined && { logs }) });
    return false;
  }
  say(dim('  Everything was stopped and removed; downloads and the built image stay in the cache.'));
  say();
  closingLine({ ok: true, ...result });
  return true;
}

let choices: DemoChoices | undefined;
try {
  choices = choose();
} catch (error) {
  say(`${error instanceof Error ? error.message : String(error)}\n${USAGE}`);
  closingLine({ ok: false, error: 'unknown option' });
  process.exit(1);
}
if (choices === undefined) {
  say(USAGE);
} else {
  const ok = await main(choices);
  // Steps that an interruption left half done would keep the process alive.
  process.exit(ok ? 0 : 1);
}
