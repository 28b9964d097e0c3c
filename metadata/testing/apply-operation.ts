/** The operations of the model, made on the stores. */
import { MetadataError } from '../errors.js';
import type { LayerInput, LayerStore } from '../layers.js';
import type { SnapshotStore } from '../snapshots.js';
import type { Operation, Outcome } from './snapshot-model.js';

/** A layer of which only the digest matters. */
export function someLayer(digest: string): LayerInput {
  return {
    digest,
    imageRef: 'registry.example:5000/some/image:tag',
    manifestDigest: `sha256:${'9'.repeat(64)}`,
    mediaType: 'application/vnd.oci.image.layer.v1.erofs',
    size: 4096,
    kind: 'erofs',
    diffId: '',
  };
}

export function applyOperation(snapshots: SnapshotStore, layers: LayerStore, operation: Operation): Outcome {
  try {
    return { value: apply(snapshots, layers, operation) };
  } catch (error) {
    if (error instanceof MetadataError) return { error: error.code };
    throw error;
  }
}

function apply(snapshots: SnapshotStore, layers: LayerStore, operation: Operation): unknown {
  switch (operation.call) {
    case 'create': {
      const { kind, key, parent, labels } = operation;
      return snapshots.create(kind, key, parent, labels).parents.map(({ name }) => name);
    }
    case 'createLayerSnapshot': {
      const { id } = layers.findOrCreate(someLayer(operation.digest));
      const { name, parent, labels } = operation;
      return snapshots.createLayerSnapshot(name, parent, labels, id).parents.map((ancestor) => ancestor.name);
    }
    case 'commit':
      snapshots.commit(operation.name, operation.key, operation.labels, operation.usage, operation.parent);
      return undefined;
    case 'remove': {
      const { releasedLayerId } = snapshots.remove(operation.key);
      return releasedLayerId === undefined ? '' : layers.get(releasedLayerId).digest;
    }
    case 'update':
      snapshots.update(operation, operation.paths);
      return undefined;
    case 'setUsage':
      snapshots.setUsage(operation.name, operation.usage);
      return undefined;
    case 'findByChain':
      return snapshots.findByChain(operation.chain, operation.parent)?.name;
    case 'release': {
      const layer = layers.findByDigest(operation.digest);
      return layer === undefined ? false : layers.release(layer.id);
    }
  }
}

/**
 * Whether both gave the same. Where several snapshots have a chain ID and a parent, any of them is right.
 */
export function isSameOutcome(operation: Operation, ofModel: Outcome, ofStore: Outcome): boolean {
  if (operation.call === 'findByChain' && 'value' in ofModel && 'value' in ofStore) {
    const names = ofModel.value as string[];
    return ofStore.value === undefined ? names.length === 0 : names.includes(ofStore.value as string);
  }
  return JSON.stringify(ofModel) === JSON.stringify(ofStore);
}
