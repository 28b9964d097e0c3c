/**
 * `npm run test:crash`: kills daemons under a container that reads its whole image again and again and compares digests:
 * at every named fault point, and at random moments while other layers come and go.
 *
 *   --kills N        random moments, default 200
 *   --format F       erofs (default) or tar+gzip: of the image that is read
 *   --files N        reads so many files of it instead of all
 *   --readers N      threads that read, default 3
 *   --burst N        random moments one after the other before all is looked at, default 1; N > 1 measures no stall of one death
 *   --part K/N       every Nth fault point and burst, from the Kth on (1 to N): a run of all in N pieces
 *   --seed N         of the random moments; printed, so that a run can be repeated
 *   --points LIST    `all` (default), `none`, or names of fault points with commas between
 *   --stalls N       no more than this: the data plane is killed so many times while nothing but the container is at work, each time when
 *                    another stands by, and the longest stall is held to 2 s beyond the start of a Node process
 *   --quiet          the machine has nothing else to do, so that stalls are judged also where every instruction is emulated
 *   --short          what CI runs: all fault points and a few random moments, with tar+gzip
 *
 *   --verify --root DIRECTORY --blobs DIRECTORY…   kills nobody: see verify.ts
 *
 * The last line is one JSON object; the status is 0 when there was no wrong byte, no error in the container, nothing
 * left at the end, and every new container ran.
 */
import path from 'node:path';
import { parseArgs } from 'node:util';
import { execa } from 'execa';
import { type FaultPoint, FAULT_POINTS } from '../../daemon/fault-point.js';
import { SeededRandom } from '../../metadata/testing/seeded-random.js';
import { buildDebianImage } from '../image/debian-image.js';
import { smallErofs } from '../image/small-erofs.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import type { Containerd } from '../stack/containerd.js';
import { patience } from '../patience.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry } from '../system/layer-registry.js';
import { backendOf, missingForSystemTests } from '../system/requirements.js';
import { CrashNode, type Victim } from './crash-node.js';
import { expectedFiles, sample } from './expected-files.js';
import {
  faultPlans,
  type Kill,
  killAlone,
  killAtFaultPoint,
  killAtMoments,
  type Moment,
  type Scene,
} from './kills.js';
import { LayerLife } from './layer-life.js';
import { remainingProcesses, remainingState } from './remains.js';
import { median, report } from './report.js';
import { originalsIn, reportVerdict, verifyRoot } from './verify.js';
import { monotonic, Witness } from './witness.js';

const { values } = parseArgs({
  options: {
    kills: { type: 'string' },
    format: { type: 'string' },
    files: { type: 'string' },
    readers: { type: 'string', default: '3' },
    stalls: { type: 'string' },
    burst: { type: 'string', default: '1' },
    part: { type: 'string', default: '1/1' },
    seed: { type: 'string' },
    points: { type: 'string', default: 'all' },
    short: { type: 'boolean', default: false },
    quiet: { type: 'boolean', default: false },
    verify: { type: 'boolean', default: false },
    root: { type: 'string' },
    blobs: { type: 'string', multiple: true, default: [] },
  },
});
const KILLS = Number(values.kills ?? (values.short ? 4 : 200));
const FORMAT = (values.format ?? (values.short ? 'tar+gzip' : 'erofs')) as 'erofs' | 'tar+gzip';
const SEED = Number(values.seed ?? Date.now() % 1_000_000);
const STALLS = Number(values.stalls ?? 0);
const BURST = Number(values.burst);
const [PART = 0, PARTS = 0] = values.part.split('/').map(Number);
const ALL_POINTS: readonly string[] = Object.values(FAULT_POINTS).flatMap((groups) =>
  (Object.values(groups) as (readonly FaultPoint[])[]).flat(),
);
/** Undefined: all of them. */
const POINTS =
  values.points === 'all'
    ? undefined
    : new Set<string>(values.points.split(',').filter((name) => name !== '' && name !== 'none'));
for (const name of POINTS ?? [])
  if (!ALL_POINTS.includes(name)) throw new Error(`--points: there is no ${name}`);
/** Numbers are checked here: a misspelt one would mean a run that kills nobody and is content. */
for (const [name, number] of Object.entries({
  KILLS,
  STALLS,
  SEED,
  readers: Number(values.readers),
  BURST,
  PARTS,
}))
  if (!Number.isSafeInteger(number) || number < 0) throw new Error(`${name}: expected a whole number`);
if (!(BURST >= 1 && PART >= 1 && PART <= PARTS))
  throw new Error('--burst: expected a number above 0; --part: expected K/N');
/**
 * What a stall after the death of the data plane may take, in milliseconds: two seconds beyond the start of a Node process.
 * Where every instruction is emulated, that is as many starts of Node as two seconds are on an ordinary machine, some 85 ms
 * each. Undefined where it would say more of the machine than of us: it has other work too, or a read waits through several
 * deaths.
 */
function stallLimit(nodeStart: number): number | undefined {
  if (STALLS > 0) return nodeStart + 2000;
  if (values.short || BURST > 1 || (patience(1) > 1 && !values.quiet)) return undefined;
  return nodeStart + (patience(1) > 1 ? Math.round((2000 / 85) * nodeStart) : 2000);
}

/** Milliseconds before a kill at a random moment, at most: about as long as a layer's life or a pull takes. */
const LONGEST_WAIT = Math.min(patience(1200), 3000);
const VICTIMS: readonly Victim[] = ['blobserve', 'snapshotter', 'both', 'containerd'];
const CONFIGURATION = 'version = 1\n';

function note(message: string): void {
  console.log(`${(performance.now() / 1000).toFixed(1).padStart(7)} s  ${message}`);
}

async function nodeStartTime(): Promise<number> {
  const times: number[] = [];
  for (let run = 0; run < 5; run += 1) {
    const start = performance.now();
    await execa(process.execPath, ['-e', '0']);
    times.push(performance.now() - start);
  }
  return median(times);
}

/** The first start of all, cut short at every point where a FUSE connection is made. @returns what failed */
async function firstStarts(node: CrashNode, isFuse: boolean): Promise<string[]> {
  const failures: string[] = [];
  for (const point of isFuse ? FAULT_POINTS.snapshotter.startFuse : []) {
    await node.arm(point);
    await node.startSnapshotter();
    await node.died(point).catch((error: unknown) => failures.push(String(error)));
    await node.whole();
    // As after a reboot: no connection, no data plane.
    await node.stop();
    node.startAgain();
  }
  return failures;
}

async function kills(scene: Scene, random: SeededRandom): Promise<Kill[]> {
  const done: Kill[] = [];
  const add = (kill: Kill): void => {
    done.push(kill);
    note(`${kill.kind}, ${kill.where}: stall ${kill.stall} ms${kill.failures.length > 0 ? ', FAILED' : ''}`);
    for (const failure of kill.failures) console.log(`           ${failure}`);
  };
  for (let number = 0; number < STALLS; number += 1) add(await killAlone(scene, random.below(LONGEST_WAIT)));
  if (STALLS > 0) return done;
  const work: (() => Promise<Kill[]>)[] = faultPlans(scene.backend)
    .filter(({ point }) => POINTS === undefined || POINTS.has(point))
    .map((plan) => async () => [await killAtFaultPoint(scene, plan)]);
  for (let number = 0; number < KILLS; number += BURST) {
    const moments: Moment[] = [];
    for (let at = number; at < Math.min(number + BURST, KILLS); at += 1)
      moments.push({ victim: VICTIMS[at % VICTIMS.length] ?? 'both', after: random.below(LONGEST_WAIT) });
    work.push(() => killAtMoments(scene, moments, number));
  }
  for (const [index, kill] of work.entries())
    if (index % PARTS === PART - 1) for (const one of await kill()) add(one);
  return done;
}

/** Everything of containerd's. A pull that was cut short has left a lease, which holds its snapshots for a day. */
async function removeAll(containerd: Containerd): Promise<void> {
  const { stdout } = await containerd.ctr('leases', 'ls', '--quiet');
  for (const lease of String(stdout).split('\n').filter(Boolean)) await containerd.ctr('leases', 'rm', lease);
  await containerd.removeAll();
}

async function main(): Promise<boolean> {
  const missing = await missingForSystemTests();
  if (missing !== undefined) {
    console.log(`skipped: ${missing}`);
    console.log(JSON.stringify({ ok: true, passed: 0, failed: 0, skipped: 1 }));
    return true;
  }
  note(
    STALLS > 0
      ? `${STALLS} deaths of the data plane; image of ${FORMAT} layers`
      : `seed ${SEED}; part ${PART} of ${PARTS} of all fault points and ${KILLS} random moments; image of ${FORMAT} layers`,
  );
  const nodeStart = await nodeStartTime();
  const stack = await Stack.create('erofs-nbd-crash');
  const layers = await LayerRegistry.start();
  const node = new CrashNode(stack.directory, CONFIGURATION);
  const failures: string[] = [];
  try {
    const image = await buildDebianImage({ format: FORMAT });
    const tinyImage = await buildTinyImage({ format: 'erofs' });
    const churnedImage = await buildTinyImage({ format: 'erofs-lz4hc' });
    const files = await expectedFiles(image, path.join(stack.directory, 'expected'));
    const watched = values.files === undefined ? files : sample(files, Number(values.files));
    note(`image of ${files.size} files, of which ${watched.size} are read`);
    const registry = await stack.startRegistry();
    const reference = await registry.push(image, 'watched:1');
    const tiny = await registry.push(tinyImage, 'tiny:1');
    const churned = await registry.push(churnedImage, 'churned:1');
    const small = await smallErofs(stack.directory, 2 ** 20);
    note('images are in the registry');

    await node.startSnapshotter();
    await node.whole();
    const backend = (await backendOf(await node.snapshotter)) === 'nbd' ? 'nbd' : 'fuse';
    await node.stop();
    node.startAgain();
    if (STALLS === 0) failures.push(...(await firstStarts(node, backend === 'fuse')));
    await node.startSnapshotter();
    await node.startContainerd();
    note('daemons run');
    const containerd = await node.containerd;
    for (const name of [reference, tiny])
      await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', name);
    const record = path.join(stack.directory, 'record');
    const witness = await Witness.start(containerd, reference, record, watched, Number(values.readers));
    await witness.passed(monotonic());
    note('the container reads');
    const life = new LayerLife(layers, small.image, (await node.snapshotter).plugin.address);
    const scene: Scene = {
      ...{ node, witness, life, backend, churned },
      small: { reference: tiny, prints: TINY_GREETING },
    };
    const done = await kills(scene, new SeededRandom(SEED));

    const reading = await witness.stop();
    for (const complaint of witness.complaints.slice(0, 20)) failures.push(`in the container: ${complaint}`);
    await removeAll(await node.containerd);
    const leaks = await remainingState(node);
    await node.uninstall().catch((error: unknown) => failures.push(String(error)));
    failures.push(...(await stack.stop()));
    leaks.push(...(await remainingProcesses(stack.directory)));
    const inLayouts = originalsIn([image, tinyImage, churnedImage].map(({ layout }) => layout));
    const verdict = await verifyRoot(
      node.places.root,
      async (digest) => life.original(digest) ?? inLayouts(digest),
    );
    note(`${verdict.spans} spans of ${verdict.trusted} blobs are marked as valid in the cache, and compared`);
    failures.push(...verdict.failures);
    return report({
      ...{ attach: backend, kills: done, reading, leaks, failures, nodeStart },
      stallLimit: stallLimit(nodeStart),
    });
  } finally {
    await node.stop().catch((error: unknown) => console.error(error));
    await layers.server.close();
    for (const trouble of await stack.remove()) console.error(trouble);
  }
}

async function verify(): Promise<boolean> {
  const { root, blobs } = values;
  if (root === undefined || blobs.length === 0)
    throw new Error('--verify: say --root DIRECTORY and --blobs DIRECTORY, of what the registry has');
  return reportVerdict(root, await verifyRoot(root, originalsIn(blobs)));
}

process.exitCode = (await (values.verify ? verify() : main())) ? 0 : 1;
