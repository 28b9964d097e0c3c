import { once } from 'node:events';
import { describe, expect, it } from 'vitest';
import { LayerStore } from './layers.js';
import { SnapshotStore } from './snapshots.js';
import { checkInvariants } from './testing/invariants.js';
import { SeededRandom } from './testing/seeded-random.js';
import { randomOperation, SnapshotModel } from './testing/snapshot-model.js';
import { spawnTypescript } from './testing/spawn-typescript.js';
import { temporaryRoots } from './testing/temporary-root.js';

const { root: newRoot, open } = temporaryRoots();

/** Runs random operations in a process that is killed as soon as `count` of them were answered; how many were in the end. */
async function operationsUntilKilled(root: string, seed: number, count: number): Promise<number> {
  const child = spawnTypescript('./crash-child.ts', [root, String(seed)]);
  let answered = 0;
  let errors = '';
  child.stderr.setEncoding('utf8').on('data', (text: string) => (errors += text));
  child.stdout.on('data', (dots: Buffer) => {
    answered += dots.length;
    if (answered >= count) child.kill('SIGKILL');
  });
  const [, signal] = (await once(child, 'close')) as [number | null, string | null];
  expect(signal, errors).toBe('SIGKILL');
  return answered;
}

describe('a process killed in the middle of operations', () => {
  it('leaves the state after a whole number of them, with every one that was answered', async () => {
    const root = newRoot();
    let model = new SnapshotModel();
    for (const [seed, count] of [
      [11, 1],
      [12, 40],
      [13, 150],
    ] as const) {
      const answered = await operationsUntilKilled(root, seed, count);
      const database = open(root, { patienceMs: 10_000 });
      const snapshots = new SnapshotStore(database);
      const layers = new LayerStore(database);
      checkInvariants(database, snapshots, layers);
      const found = SnapshotModel.of(snapshots, layers);

      const random = new SeededRandom(seed);
      for (let done = 0; done < answered; done += 1) model.apply(randomOperation(random, model));
      // One more may have been made whose answer was not written; that of a layer's snapshot records the layer before.
      const states = [JSON.stringify(model)];
      const last = randomOperation(random, model);
      if (last.call === 'createLayerSnapshot') {
        model.layers.add(last.digest);
        states.push(JSON.stringify(model));
      }
      model.apply(last);
      states.push(JSON.stringify(model));
      expect(states).toContain(JSON.stringify(found));
      model = found;
      database.close();
    }
  });
});
