/**
 * What a report is made of: the layers that are attached, what was read and fetched of each, and the names of its files.
 */
import path from 'node:path';
import { layout } from '../../daemon/layout.js';
import { control } from '../../proto/messages.js';
import { CallError } from '../../proto/unary-call.js';
import { status } from '@grpc/grpc-js';
import { askDataPlane } from '../node.js';
import { layerStatus, type LayerStatus } from '../status-report.js';
import { layerFiles, type LayerFiles } from './layer-files.js';
import type { Fetch, Read } from './reading.js';

export interface LayerRecord {
  readonly status: LayerStatus;
  /** In the order in which they were asked for; times in milliseconds since {@link ImageRecord.beganAt}. */
  readonly reads: readonly Read[];
  readonly fetches: readonly Fetch[];
  /** What the record has no room for. */
  readonly leftOut: { readonly reads: number; readonly fetches: number };
  /** Or why they cannot be told. */
  readonly files: LayerFiles | string;
}

export interface ImageRecord {
  /** The first event, in milliseconds since 1970-01-01 UTC. */
  readonly beganAt: number;
  /** In the image's order, the lowest first; those that are attached. */
  readonly layers: readonly LayerRecord[];
}

const URGENCIES: Readonly<Record<number, Fetch['urgency']>> = {
  [control.FetchUrgency.WANTED]: 'wanted',
  [control.FetchUrgency.READAHEAD]: 'readahead',
  [control.FetchUrgency.BACKGROUND]: 'background',
  [control.FetchUrgency.AHEAD]: 'ahead',
};

/**
 * @param root of the snapshotter
 * @param wanted which of the attached layers: digests in the order they are reported in
 * @throws {Failure} when nothing answers
 */
export async function gatherRecord(
  root: string,
  wanted: readonly string[],
  signal: AbortSignal,
): Promise<ImageRecord> {
  const found = await askDataPlane(root, async (client) => {
    const { devices } = await client.list();
    const result: { device: control.Device.$Properties; reading: control.ReadingResponse }[] = [];
    for (const digest of wanted) {
      const device = devices.find(({ layerDigest }) => layerDigest === digest);
      if (typeof device?.layerId !== 'number') continue;
      try {
        result.push({ device, reading: await client.reading(device.layerId) });
      } catch (error) {
        // It was detached meanwhile.
        if (!(error instanceof CallError) || error.code !== status.NOT_FOUND) throw error;
      }
    }
    return result;
  });
  const events = found.flatMap(({ reading }) =>
    [...reading.reads, ...reading.fetches].map(({ atMs }) => reading.beganAtMs + (atMs ?? 0)),
  );
  const beganAt = events.reduce((first, at) => Math.min(first, at), events[0] ?? Date.now());
  const layers: LayerRecord[] = [];
  for (const { device, reading } of found) {
    const mountPoint = path.join(layout(root).layers, String(device.layerId), 'fs');
    layers.push({ ...layerRecord(device, reading, beganAt), files: await filesOf(mountPoint, signal) });
  }
  return { beganAt, layers };
}

function layerRecord(
  device: control.Device.$Properties,
  { beganAtMs, reads, fetches, readsLeftOut, fetchesLeftOut }: control.ReadingResponse,
  beganAt: number,
): Omit<LayerRecord, 'files'> {
  // Fractions of milliseconds since 1970 are rounded.
  const since = (atMs: number): number => Math.max(0, beganAtMs + atMs - beganAt);
  const byTime = (a: { at: number }, b: { at: number }): number => a.at - b.at;
  return {
    status: layerStatus(device),
    reads: reads
      .map((each) => control.RecordedRead.create(each))
      .map(({ atMs, offset, length, count, waitMs }) => ({
        at: since(atMs),
        offset,
        length,
        count,
        wait: waitMs,
      }))
      .sort(byTime),
    fetches: fetches
      .map((each) => control.RecordedFetch.create(each))
      .map(({ atMs, ms, offset, length, urgency, failed }) => ({
        at: since(atMs),
        ms,
        offset,
        length,
        urgency: URGENCIES[urgency] ?? 'background',
        failed,
      }))
      .sort(byTime),
    leftOut: { reads: readsLeftOut, fetches: fetchesLeftOut },
  };
}

async function filesOf(mountPoint: string, signal: AbortSignal): Promise<LayerFiles | string> {
  try {
    return await layerFiles(mountPoint, signal);
  } catch (error) {
    signal.throwIfAborted();
    return error instanceof Error ? error.message : String(error);
  }
}
