/**
 * `npm run bench -- coldstart`: a container's start on a node that has nothing of its image, ours beside containerd's own
 * snapshotters, SOCI's and stargz's, over links of 50 and of 200 Mbit/s with 20 ms there and back.
 *
 *     npm run bench -- coldstart [--runs 1] [--images python,node,java] [--mbit 50,200] [--ms 20] [--systems overlayfs,...]
 *                                [--results DIR] [--fresh]
 *
 * Time runs from the beginning of the pull; starting the daemons, which have empty directories each time, is before it.
 * `--results` keeps a file per run, and does not do again what is there; `--fresh` publishes everything again.
 */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { removeAbandonedStacks } from '../stack/abandoned.js';
import { inMountNamespace } from '../stack/mount-namespace.js';
import { Stack } from '../stack/stack.js';
import { coldStart, type ColdStart } from './coldstart/cold-start.js';
import { CONTENTS, forgetContents, keptContents, PREFIX, provide } from './coldstart/contents.js';
import { IMAGES } from './coldstart/images.js';
import { medians, ratios, summary, tables, type Run } from './coldstart/report.js';
import { certificates, SYSTEMS } from './coldstart/systems.js';

interface Choices {
  readonly runs: number;
  readonly images: typeof IMAGES;
  readonly systems: typeof SYSTEMS;
  readonly mbit: readonly number[];
  readonly ms: number;
  readonly results: string | undefined;
  readonly fresh: boolean;
}

/** The named ones of a list, in its order. */
function choose<Entry extends { readonly name: string }>(
  all: readonly Entry[],
  names: string | undefined,
): Entry[] {
  const wanted = names?.split(',');
  for (const name of wanted ?? [])
    if (!all.some((entry) => entry.name === name))
      throw new Error(`no ${name}; there are ${all.map((entry) => entry.name).join(', ')}`);
  return all.filter(({ name }) => wanted?.includes(name) ?? true);
}

function choices(arguments_: string[]): Choices {
  const { values } = parseArgs({
    args: arguments_,
    options: {
      runs: { type: 'string', default: '1' },
      images: { type: 'string' },
      systems: { type: 'string' },
      mbit: { type: 'string', default: '50,200' },
      ms: { type: 'string', default: '20' },
      results: { type: 'string' },
      fresh: { type: 'boolean', default: false },
    },
  });
  const mbit = values.mbit.split(',').map(Number);
  const [runs, ms] = [Number(values.runs), Number(values.ms)];
  if (![...mbit, runs].every((number) => number > 0) || !(ms >= 0))
    throw new Error('--mbit and --runs take numbers above 0, --ms one from 0 on');
  return {
    ...{ runs, mbit, ms, fresh: values.fresh, results: values.results },
    images: choose(IMAGES, values.images),
    systems: choose(SYSTEMS, values.systems),
  };
}

/** Stacks that have to be removed however this ends, the newest first. */
class Running {
  readonly #stacks: Stack[] = [];
  #ending = false;
  readonly track = (stack: Stack): void => void this.#stacks.push(stack);

  /** @throws when nothing is to be begun any more */
  check(): void {
    if (this.#ending) throw new Error('interrupted');
  }

  /** Removes all of them; a stack may be removed twice. */
  async remove(): Promise<void> {
    this.#ending = true;
    for (const stack of this.#stacks.splice(0).reverse()) await stack.remove();
  }
}

/** Rejects at the first signal that asks to end; a second one while things are put away changes nothing. */
const interruption = (): Promise<never> =>
  new Promise<never>((_, reject) => {
    for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const)
      process.on(name, () => reject(new Error(`interrupted by ${name}`)));
  });

const began = performance.now();
function say(text: string): void {
  const seconds = Math.round((performance.now() - began) / 1000);
  const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`;
  console.log(`${clock.padStart(6)}  ${text}`);
}

/** Where a run's result is kept. */
const resultFile = (directory: string, { image, mbit, system, run }: Omit<Run, 'ours'>): string =>
  path.join(directory, `${image}-${mbit}-${system}-${run}.json`);

async function measure(chosen: Choices, running: Running): Promise<Run[]> {
  const { images, systems, results } = chosen;
  if (chosen.fresh) await forgetContents();
  if (results !== undefined) await mkdir(results, { recursive: true });
  const stack = await Stack.create(PREFIX);
  running.track(stack);
  const registry = await stack.startRegistry({
    storage: path.join(keptContents(), 'registry'),
    tls: certificates().right,
  });

  const contents = new Map<string, string>();
  const broken = new Map<string, string>();
  for (const image of images) {
    for (const content of new Set(systems.map((system) => system.content))) {
      running.check();
      const key = `${image.name} ${content}`;
      const progress = (message: string): void => say(`${image.name}: ${message}`);
      await provide(content, image, registry, running.track, progress).then(
        (reference) => contents.set(key, reference),
        (error: unknown) => {
          broken.set(key, inShort(error));
          say(`${key} cannot be made: ${inShort(error)}`);
        },
      );
    }
  }

  const runs: Run[] = [];
  const total = chosen.runs * images.length * chosen.mbit.length * systems.length;
  for (let run = 1; run <= chosen.runs; run++) {
    for (const mbit of chosen.mbit) {
      for (const image of images) {
        for (const system of systems) {
          running.check();
          const which = { system: system.name, ours: system.ours, image: image.name, mbit, run };
          const key = `${image.name} ${system.content}`;
          const content = contents.get(key);
          const number = `${runs.length + 1}/${total} ${image.name}, ${mbit} Mbit/s, ${system.name}`;
          const kept = results === undefined ? undefined : resultFile(results, which);
          const earlier = kept && (await readFile(kept, 'utf8').catch(() => undefined));
          if (earlier !== undefined) {
            runs.push({ ...which, start: JSON.parse(earlier) as ColdStart });
            say(`${number}: kept from before`);
            continue;
          }
          if (content === undefined) {
            runs.push({ ...which, error: broken.get(key) ?? 'its image was not made' });
            continue;
          }
          try {
            const shape = { bitsPerSecond: mbit * 1e6, roundTripMs: chosen.ms };
            const start = await coldStart(system, image, content, registry, shape, running.track);
            runs.push({ ...which, start });
            if (kept !== undefined) await writeFile(kept, JSON.stringify(start));
            say(
              `${number}: first line after ${start.first_line_s.toFixed(2)} s (pull ${start.pull_s.toFixed(2)} s), ` +
                `${(start.wire_bytes / 2 ** 20).toFixed(1)} MiB in ${start.requests} requests`,
            );
          } catch (error) {
            runs.push({ ...which, error: inShort(error) });
            say(`${number}: failed: ${inShort(error)}`);
          }
        }
      }
    }
  }
  return runs;
}

/** An error's last words in one line. */
function inShort(error: unknown): string {
  const lines = (error instanceof Error ? error.message : String(error)).split('\n').filter(Boolean);
  const text = lines.length > 2 ? `${lines[0]} … ${lines.slice(-2).join(' ')}` : lines.join(' ');
  return text.length > 600 ? `${text.slice(0, 300)} … ${text.slice(-300)}` : text;
}

export async function coldstart(arguments_: string[]): Promise<void> {
  const chosen = choices(arguments_);
  await inMountNamespace();
  await removeAbandonedStacks(PREFIX);
  console.log(
    `cold starts, ${chosen.ms} ms there and back, ${os.cpus().length} cores, Linux ${os.release()}\n`,
  );
  for (const { name, does } of chosen.images) console.log(`${name}: ${does}`);
  console.log('');
  for (const { name, content, settings } of chosen.systems)
    console.log(`${name}: ${CONTENTS[content]?.is ?? content}; ${settings}`);
  console.log(
    `\nTime is from the beginning of the pull, with daemons that have just been started on empty directories. On the wire:
all bytes to the node with their headers, and all requests, until the container has ended. Memory: the sum of the
peak RSS of containerd and of the snapshotter's processes; not of containers, their shims, clients and mkfs.erofs.\n`,
  );
  const running = new Running();
  const work = measure(chosen, running);
  let runs: Run[];
  try {
    runs = await Promise.race([work, interruption()]);
  } catch (error) {
    await running.remove();
    // What was under way ends without what it needs, and cleans up after itself too.
    await work.catch(() => undefined);
    console.error(inShort(error));
    process.exit(1);
  }
  await running.remove();
  const rows = medians(runs);
  const compared = ratios(rows);
  console.log(tables(rows));
  if (compared.length > 0) console.log(summary(compared));
  const ok = compared.length > 0 && compared.every(({ met }) => met) && rows.every(({ error }) => !error);
  console.log(JSON.stringify({ ok, ms: chosen.ms, runs: chosen.runs, rows, ratios: compared }));
  process.exit(rows.some((row) => row.runs > 0) ? 0 : 1);
}
