import { expect } from 'vitest';
import type { MetadataDatabase } from '../database.js';
import type { LayerStore } from '../layers.js';
import type { SnapshotStore } from '../snapshots.js';

/** What holds for every database at any time, whatever was done to it. */
export function checkInvariants(
  database: MetadataDatabase,
  snapshots: SnapshotStore,
  layers: LayerStore,
): void {
  const all = <R>(sql: string): R[] => database.read(sql, () => database.prepare<[], R>(sql).all());
  expect(all('PRAGMA integrity_check')).toEqual([{ integrity_check: 'ok' }]);
  expect(all('PRAGMA foreign_key_check')).toEqual([]);

  const infos = [...snapshots.list()];
  const kinds = new Map(infos.map(({ name, kind }) => [name, kind]));
  expect(kinds.size).toBe(infos.length);
  for (const info of infos) {
    expect(info.name).not.toBe('');
    expect(info.updatedNs >= info.createdNs).toBe(true);
    expect(Object.values(info.labels)).not.toContain('');
    if (info.parent !== '') expect(kinds.get(info.parent)).toBe('committed');
    const { kind, layerId, parents } = snapshots.get(info.name);
    expect(kind).toBe(info.kind);
    expect(parents[0]?.name ?? '').toBe(info.parent);
    if (layerId !== null) {
      expect(kind).toBe('committed');
      expect(layers.isUsed(layerId)).toBe(true);
      layers.get(layerId);
    }
  }
  for (const { id } of layers.orphans()) expect(layers.isUsed(id)).toBe(false);
  for (const { layerId } of layers.devices()) layers.get(layerId);
}
