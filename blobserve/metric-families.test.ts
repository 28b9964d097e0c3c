import { readFile } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import { snapshotterFamilies } from '../snapshotter/metrics.js';
import { control } from '../proto/messages.js';
import { dataPlaneFamilies } from './metric-families.js';
import { counted, exchangeBegins } from './metrics.js';

const families = dataPlaneFamilies({ devices: [], hosts: [] });
const names = [...families, ...snapshotterFamilies({ layers: 0, cacheBytes: 0 })]
  .map(({ name }) => name)
  .concat('erofs_nbd_data_plane_up');

describe('the metrics of the data plane', () => {
  it('are named once each, counters with _total', () => {
    expect(new Set(names).size).toBe(names.length);
    for (const { name, type } of families)
      expect([name, name.endsWith('_total')]).toEqual([name, type === 'counter']);
  });

  it.each(['operating.md', 'alerts.yaml', 'grafana.json'])(
    'are those that docs/%s speaks of',
    async (file) => {
      const text = await readFile(new URL(`../docs/${file}`, import.meta.url), 'utf8');
      const used = new Set([...text.matchAll(/\berofs_nbd_[a-z_]*[a-z]/g)].map(([name]) => name));
      // The prefixes of what each of the two processes takes are written with "…" in the table.
      for (const prefix of ['erofs_nbd_snapshotter', 'erofs_nbd_blobserve']) used.delete(prefix);
      expect(used.size).toBeGreaterThan(5);
      const known = (name: string): boolean => names.includes(name.replace(/_(bucket|sum|count)$/, ''));
      expect([...used].filter((name) => !known(name))).toEqual([]);
      const ofProcesses = /_(resident_bytes|cpu_seconds_total|uptime_seconds)$/;
      const missing = names.filter((name) => !used.has(name) && !ofProcesses.test(name));
      if (file === 'operating.md') expect(missing).toEqual([]);
    },
  );

  it('sum the reads of all devices, and never go back when one is detached', () => {
    const device = (reads: number, oldestReadMs: number): control.Device.$Properties => ({
      backend: control.Backend.FUSE,
      statistics: { reads, readBytes: reads * 4096, readsInFlight: 1, oldestReadMs },
    });
    const value = (name: string, devices: control.Device.$Properties[]): number =>
      dataPlaneFamilies({ devices, hosts: [] })
        .find((family) => family.name === name)
        ?.samples.at(-1)?.value ?? NaN;
    const both = [device(3, 500), device(4, 2500)];
    const before = value('erofs_nbd_device_reads_total', []);
    expect(value('erofs_nbd_device_reads_total', both) - before).toBe(7);
    expect(value('erofs_nbd_device_reads_in_flight', both)).toBe(2);
    expect(value('erofs_nbd_oldest_blocked_read_seconds', both)).toBe(2.5);
    expect(value('erofs_nbd_attached_devices', both)).toBe(2);
    counted.detached.reads += 4;
    expect(value('erofs_nbd_device_reads_total', both.slice(0, 1)) - before).toBe(7);
  });

  it('know of each host how its last exchange went', () => {
    const host = 'registry.example:5000';
    const known = () => counted.hosts.of(host);
    exchangeBegins(host)(206);
    expect(known()).toMatchObject({ requests: 1, failures: 0, trouble: '' });
    exchangeBegins(host)(503);
    expect(known()).toMatchObject({ requests: 2, failures: 1, trouble: 'status 503' });
    exchangeBegins(host)('connection refused');
    expect(known()).toMatchObject({ requests: 3, failures: 2, trouble: 'connection refused' });
    // What it refuses, it refuses in good health.
    exchangeBegins(host)(401);
    expect(known()).toMatchObject({ requests: 4, failures: 2, trouble: '' });
    expect(counted.requests.of(host, 'none').count).toBe(1);
  });
});
