import { describe, expect, it } from 'vitest';
import { LayerStore } from './layers.js';
import { SnapshotStore } from './snapshots.js';
import { applyOperation, isSameOutcome } from './testing/apply-operation.js';
import { checkInvariants } from './testing/invariants.js';
import { SeededRandom } from './testing/seeded-random.js';
import { randomOperation, SnapshotModel } from './testing/snapshot-model.js';
import { temporaryRoots } from './testing/temporary-root.js';

const { root: newRoot, open } = temporaryRoots();

describe('random operations', () => {
  it.each([1, 2, 3])('give what the rules say and keep the invariants (seed %i)', (seed) => {
    const root = newRoot();
    const random = new SeededRandom(seed);
    const model = new SnapshotModel();
    const outcomes = new Set<string>();
    const numbers = new Set<number>();
    for (let session = 0; session < 2; session += 1) {
      const database = open(root);
      const snapshots = new SnapshotStore(database);
      const layers = new LayerStore(database);
      for (let step = 0; step < 300; step += 1) {
        const operation = randomOperation(random, model);
        const expected = model.apply(operation);
        const outcome = applyOperation(snapshots, layers, operation);
        const told = JSON.stringify({ seed, session, step, operation, expected, outcome });
        expect(isSameOutcome(operation, expected, outcome), told).toBe(true);
        outcomes.add(`${operation.call} ${'error' in expected ? expected.error : 'done'}`);
        if (operation.call === 'create' && 'value' in outcome) {
          const { id } = snapshots.get(operation.key);
          expect(numbers.has(id), told).toBe(false);
          numbers.add(id);
        }
      }
      expect(SnapshotModel.of(snapshots, layers).toJSON()).toEqual(model.toJSON());
      checkInvariants(database, snapshots, layers);
      database.close();
    }
    // The seeds reach every call, and every error of the calls with rules.
    expect([...outcomes].sort()).toEqual(
      expect.arrayContaining([
        'commit already_exists',
        'commit done',
        'commit failed_precondition',
        'commit invalid_argument',
        'commit not_found',
        'create already_exists',
        'create done',
        'create invalid_argument',
        'create not_found',
        'createLayerSnapshot already_exists',
        'createLayerSnapshot done',
        'createLayerSnapshot invalid_argument',
        'createLayerSnapshot not_found',
        'findByChain done',
        'release done',
        'remove done',
        'remove failed_precondition',
        'remove not_found',
        'setUsage done',
        'setUsage failed_precondition',
        'update done',
        'update invalid_argument',
        'update not_found',
      ]),
    );
  });
});
