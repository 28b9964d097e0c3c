/** One cold start: daemons with nothing in their directories, a pull, a container until it has ended. */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { runUntilOutput } from '../../../demo/first-output.js';
import type { Registry } from '../../stack/registry.js';
import { startShapedLink, type LinkShape } from '../../stack/shaped-link.js';
import { Stack } from '../../stack/stack.js';
import { PREFIX } from './contents.js';
import type { ColdImage } from './images.js';
import type { ColdSystem } from './systems.js';

/** The keys of a row of the last line. Times are seconds from the beginning of the pull. */
export interface ColdStart {
  readonly pull_s: number;
  /** Until the first byte that the container printed. */
  readonly first_line_s: number;
  readonly exit_s: number;
  /** What the link carried to the node until the container had ended: all bodies and headers. */
  readonly wire_bytes: number;
  /** All requests that the registry got until then. */
  readonly requests: number;
  /** The same two until the pull had ended, and until the first line. */
  readonly pull_bytes: number;
  readonly pull_requests: number;
  readonly first_line_bytes: number;
  readonly first_line_requests: number;
  /** Sum of the daemons' peaks (VmHWM), containerd's too. */
  readonly peak_rss_bytes: number;
  readonly daemons: Readonly<Record<string, number>>;
}

/** Seconds after which a start is given up. */
const LIMIT = 240;

async function peakMemory(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  return Number(/^VmHWM:\s+(\d+) kB$/m.exec(status)?.[1] ?? NaN) * 1024;
}

/**
 * @param content `repository:tag`
 * @param track told of what has to be removed when the work is interrupted
 * @throws when it does not print what it should, or not in time, with the ends of the daemons' logs kept by EROFS_NBD_TEST_LOGS
 */
export async function coldStart(
  system: ColdSystem,
  image: ColdImage,
  content: string,
  registry: Registry,
  shape: LinkShape,
  track: (stack: Stack) => void,
): Promise<ColdStart> {
  const stack = await Stack.create(PREFIX);
  track(stack);
  const upstream = system.tls === undefined ? registry.address : (registry.secureAddress ?? registry.address);
  const link = await startShapedLink(upstream, shape);
  const late = new AbortController();
  try {
    const node = await system.start(stack, link.address);
    const timeout = delay(LIMIT * 1000, undefined, { signal: late.signal }).then(() => {
      throw new Error(`not ended after ${LIMIT} s`);
    });
    timeout.catch(() => undefined);
    return await Promise.race([start(), timeout]);

    async function start(): Promise<ColdStart> {
      const requestsBefore = registry.requests();
      const begin = performance.now();
      const now = (): { s: number; bytes: number; requests: number } => ({
        s: Math.round(performance.now() - begin) / 1000,
        bytes: link.bytes(),
        requests: registry.requests() - requestsBefore,
      });
      const reference = `${link.address}/${content}`;
      await node.pull(reference);
      const pulled = now();
      let first = pulled;
      const { output } = await runUntilOutput(
        path.join(node.containerd.programs, 'ctr'),
        ['run', '--rm', '--snapshotter', node.snapshotter, reference, 'cold'],
        node.containerd.environment,
        () => (first = now()),
      );
      const ended = now();
      if (!output.startsWith(image.greeting)) throw new Error(`it printed something else: ${output}`);
      const daemons: Record<string, number> = {};
      for (const [name, pid] of Object.entries(await node.daemons())) daemons[name] = await peakMemory(pid);
      return {
        ...{ pull_s: pulled.s, first_line_s: first.s, exit_s: ended.s },
        ...{ wire_bytes: ended.bytes, requests: ended.requests },
        ...{ pull_bytes: pulled.bytes, pull_requests: pulled.requests },
        ...{ first_line_bytes: first.bytes, first_line_requests: first.requests },
        peak_rss_bytes: Object.values(daemons).reduce((sum, bytes) => sum + bytes, 0),
        daemons,
      };
    }
  } finally {
    late.abort();
    const troubles = await stack.remove();
    await link.stop();
    if (troubles.length > 0) console.error(`could not clean up: ${troubles.join('; ')}`);
  }
}
