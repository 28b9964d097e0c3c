/**
 * Kills, one after the other, each followed by what has to work all the same.
 */
import { mkdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { FAULT_POINTS, type FaultPoint } from '../../daemon/fault-point.js';
import { patience } from '../patience.js';
import type { CrashNode, Victim } from './crash-node.js';
import type { LayerLife } from './layer-life.js';
import { monotonic, type Witness } from './witness.js';

export interface Kill {
  /** `snapshotter`, …; `fault point of snapshotter`, … */
  readonly kind: string;
  /** When, or at which point. */
  readonly where: string;
  /** Milliseconds of the container's longest read about it, 0 when all were short (see reader.py). */
  readonly stall: number;
  /** What did not work, in words. */
  readonly failures: readonly string[];
}

export interface Scene {
  readonly node: CrashNode;
  readonly witness: Witness;
  readonly life: LayerLife;
  readonly backend: 'nbd' | 'fuse';
  /** The image that every new container runs, and what it prints. */
  readonly small: { readonly reference: string; readonly prints: string };
  /** An image that is pulled, run and removed while daemons die. */
  readonly churned: string;
}

export type FaultGroup = 'up' | 'create' | 'down' | 'start';

interface FaultPlan {
  readonly point: FaultPoint;
  readonly process: 'snapshotter' | 'blobserve';
  readonly when: 'life' | 'start';
}

/** Every point that is passed while a container reads, with this backend. */
export function faultPlans(backend: 'nbd' | 'fuse'): FaultPlan[] {
  const { snapshotter, blobserve } = FAULT_POINTS;
  const plan = (
    process: FaultPlan['process'],
    when: FaultPlan['when'],
    points: readonly FaultPoint[],
  ): FaultPlan[] => points.map((point) => ({ point, process, when }));
  return [
    ...plan('snapshotter', 'life', [...snapshotter.up, ...snapshotter.create, ...snapshotter.down]),
    ...plan('blobserve', 'life', [
      ...blobserve.up,
      ...(backend === 'nbd' ? blobserve.upNbd : blobserve.upFuse),
      ...blobserve.down,
      ...(backend === 'nbd' ? blobserve.downNbd : blobserve.downFuse),
    ]),
    ...plan('snapshotter', 'start', snapshotter.start),
    ...plan('blobserve', 'start', blobserve.start),
  ];
}

const text = (error: unknown): string =>
  (error instanceof Error ? error.message : String(error)).slice(0, 500);

/** Collects what fails under a name, and goes on. */
class Checks {
  readonly failures: string[] = [];

  async that(what: string, work: () => Promise<unknown>): Promise<void> {
    try {
      await work();
    } catch (error) {
      this.failures.push(`${what}: ${text(error)}`);
    }
  }
}

/** Kills at one named point. */
export async function killAtFaultPoint(scene: Scene, { point, process, when }: FaultPlan): Promise<Kill> {
  const { node, life, witness } = scene;
  const checks = new Checks();
  const from = monotonic();
  await node.arm(point);
  if (when === 'start') await node.kill('both');
  else {
    const living = await life.live().then(
      () => undefined,
      (error: unknown) => error,
    );
    // The snapshotter asks the next data plane what the dead one has not answered.
    if (process === 'blobserve' && living !== undefined)
      checks.failures.push(`a layer's life: ${text(living)}`);
  }
  await checks.that('the point', () => node.died(point));
  await recovered(scene, checks);
  await checks.that('cleaning up', () => life.removeAll());
  await checks.that("another layer's life", () => life.live());
  await checks.that('the reading container', () => witness.passed(monotonic()));
  const stall = await witness.longestStall(from, monotonic());
  return { kind: `fault point of ${process}`, where: point, stall, failures: checks.failures };
}

/** A daemon, and how many milliseconds after what came before it is killed. */
export interface Moment {
  readonly victim: Victim;
  readonly after: number;
}

/**
 * Kills while layers come and go: at one moment, or at several before all is looked at, so that what recovers from one death
 * meets the next.
 *
 * @param number of the first
 */
export async function killAtMoments(
  scene: Scene,
  moments: readonly Moment[],
  number: number,
): Promise<Kill[]> {
  const { witness, node, life } = scene;
  const checks = new Checks();
  // A containerd that is killed while it starts a container leaves a shim of its own that nobody looks for again.
  const runs = moments.every(({ victim }) => victim !== 'containerd');
  let over = false;
  const comeAndGo = async (): Promise<void> => {
    do {
      await (Math.floor(number / 4) % 2 === 0 ? life.live() : churnImage(scene, number, runs)).catch(() =>
        delay(patience(50)),
      );
    } while (!over);
  };
  const churn = comeAndGo();
  const begun: number[] = [];
  for (const { victim, after } of moments) {
    await delay(after);
    begun.push(monotonic());
    await checks.that(`killing ${victim}`, () => node.kill(victim));
  }
  over = true;
  await recovered(scene, checks);
  await churn;
  await checks.that('cleaning up', () => life.removeAll());
  await checks.that('a new container', () => runSmall(scene, `new-${number}`));
  await checks.that('the reading container', () => witness.passed(monotonic()));
  begun.push(monotonic());
  const done: Kill[] = [];
  for (const [index, { victim, after }] of moments.entries()) {
    const stall = await witness.longestStall(begun[index] ?? 0, begun[index + 1] ?? 0);
    // What failed is of all of them; it is told once.
    const failures = index === moments.length - 1 ? checks.failures : [];
    done.push({ kind: victim, where: `after ${after} ms`, stall, failures });
  }
  return done;
}

/** Kills the data plane while nothing but the container is at work, when another stands by. */
export async function killAlone(scene: Scene, after: number): Promise<Kill> {
  const { node, witness } = scene;
  const checks = new Checks();
  await checks.that('a data plane that stands by', () => node.standsBy());
  await delay(after);
  const from = monotonic();
  await checks.that('killing blobserve', () => node.kill('blobserve'));
  await recovered(scene, checks);
  await checks.that('the reading container', () => witness.passed(monotonic()));
  const stall = await witness.longestStall(from, monotonic());
  return { kind: 'blobserve', where: `${after} ms after another stood by`, stall, failures: checks.failures };
}

async function recovered({ node }: Scene, checks: Checks): Promise<void> {
  await checks.that('the daemons', () => node.whole());
}

/** containerd fails calls at once while its connection is down, and tries again after up to three seconds. */
async function untilConnected(node: CrashNode): Promise<void> {
  const deadline = Date.now() + patience(30_000);
  for (;;) {
    try {
      await (await node.containerd).ctr('snapshots', '--snapshotter', 'erofs-nbd', 'ls');
      return;
    } catch (error) {
      if (Date.now() > deadline) throw error;
      await delay(100);
    }
  }
}

/** What it prints goes to a file: ctr loses the output of a container that ends before its pipe was opened. */
async function runSmall({ node, small }: Scene, name: string): Promise<void> {
  await untilConnected(node);
  const containerd = await node.containerd;
  const directory = path.join(node.directory, 'printed');
  await mkdir(directory, { recursive: true });
  const mount = `type=bind,src=${directory},dst=/printed,options=rbind:rw`;
  await containerd.ctr(
    ...['run', '--rm', '--snapshotter', 'erofs-nbd', '--mount', mount, small.reference, name],
    ...['sh', '-c', `cat /etc/motd > /printed/${name}`],
  );
  const printed = await readFile(path.join(directory, name), 'utf8');
  if (printed !== small.prints) throw new Error(`it printed ${JSON.stringify(printed)}`);
}

async function churnImage({ node, churned }: Scene, number: number, runs: boolean): Promise<void> {
  const containerd = await node.containerd;
  await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', churned);
  if (runs)
    await containerd.ctr('run', '--rm', '--snapshotter', 'erofs-nbd', churned, `churn-${number}`, 'true');
  await containerd.ctr('image', 'rm', '--sync', churned);
}
