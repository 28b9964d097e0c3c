/**
 * A process to be killed: makes random operations on the root it is given and writes a line after each.
 *
 *     crash-child ROOT SEED
 */
import { writeSync } from 'node:fs';
import { openDatabase } from '../database.js';
import { LayerStore } from '../layers.js';
import { SnapshotStore } from '../snapshots.js';
import { applyOperation } from './apply-operation.js';
import { SeededRandom } from './seeded-random.js';
import { randomOperation, SnapshotModel } from './snapshot-model.js';

const [root = '', seed = ''] = process.argv.slice(2);
const database = openDatabase(root, { address: '/nowhere.sock', version: '0' });
const snapshots = new SnapshotStore(database);
const layers = new LayerStore(database);
const model = SnapshotModel.of(snapshots, layers);
const random = new SeededRandom(Number(seed));
for (;;) {
  const operation = randomOperation(random, model);
  model.apply(operation);
  applyOperation(snapshots, layers, operation);
  writeSync(1, '.');
}
