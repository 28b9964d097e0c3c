import { pino } from 'pino';
import { describe, expect, it } from 'vitest';
import { control } from '../proto/messages.js';
import type { AttachBackend, AttachedDevice } from './attach/backend.js';
import type { LayerPath } from './data-path.js';
import { ReadingRecord } from './readers/reading-record.js';
import { LayerServer } from './layer-server.js';
import type { BlobReader } from './readers/blob-reader.js';

const READER = { size: 4096 } as BlobReader;

/** A registry that answers when it is told to, and a kernel that keeps count. */
class Node {
  readonly attached: number[] = [];
  /** Devices of processes that are gone. */
  readonly left = new Set<string>();
  readonly opening: { answer: () => void; fail: (error: Error) => void }[] = [];
  closed = 0;
  readonly sources: string[] = [];
  readonly server = new LayerServer({
    backend: {
      name: 'fuse',
      attach: ({ layerId }) => {
        this.attached.push(layerId);
        return Promise.resolve(this.#device(layerId));
      },
      disconnect: (identifier) => Promise.resolve(this.left.delete(identifier)),
      awaited: () => [],
      close: () => Promise.resolve(),
    } satisfies AttachBackend,
    openLayer: (_source, _checked, signal) =>
      new Promise<LayerPath>((resolve, reject) => {
        const path: LayerPath = {
          reader: READER,
          lookedInto: READER,
          record: new ReadingRecord(),
          blob: undefined,
          blobPart: () => undefined,
          indexRefused: () => false,
          statistics: () => ({ cachedBytes: 0, fetchedBytes: 0, requests: 0, misses: 0 }),
          alsoFrom: ({ imageRef }) => void this.sources.push(imageRef ?? ''),
          close: () => Promise.resolve(void (this.closed += 1)),
        };
        this.opening.push({ answer: () => resolve(path), fail: reject });
        signal.addEventListener('abort', () => reject(signal.reason as Error));
      }),
    log: pino({ level: 'silent' }),
  });

  attach(layerId = 1): Promise<control.AttachResponse.$Properties> {
    return this.server.attach(
      control.AttachRequest.create({ layerId, identifier: `erofs-nbd:${layerId}`, nbdIndex: -1, source: {} }),
    );
  }

  #device(layerId: number): AttachedDevice {
    return {
      path: `/fuse/layer-${layerId}`,
      nbdIndex: -1,
      size: READER.size,
      reconnected: false,
      statistics: () => ({ reads: 0, readBytes: 0, readErrors: 0, readsInFlight: 0, oldestReadMs: 0 }),
      detach: () => Promise.resolve(void this.attached.splice(this.attached.indexOf(layerId), 1)),
    };
  }
}

const soon = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

describe('a layer that is detached', () => {
  it('while a registry lets its attach wait: both end at once', async () => {
    const node = new Node();
    const attaching = node.attach();
    const refused = expect(attaching).rejects.toMatchObject({ kind: 'closed' });
    await soon();
    expect(await node.server.detach(1)).toBe(false);
    await refused;
    expect(node.attached).toEqual([]);
    expect(node.server.size).toBe(0);
  });

  it('by a process that never served it: the device that an earlier one had made is taken away', async () => {
    const node = new Node();
    node.left.add('erofs-nbd:1').add('erofs-nbd:2');
    expect(await node.server.detach(1)).toBe(false);
    expect(await node.server.detach(1, 'erofs-nbd:1')).toBe(true);
    expect(await node.server.detach(1, 'erofs-nbd:1')).toBe(false);
    expect([...node.left]).toEqual(['erofs-nbd:2']);
  });

  it('before attaches that still wait for their turn: none of them is made', async () => {
    const node = new Node();
    const outcomes = Promise.allSettled([node.attach(), node.attach(), node.attach()]);
    await soon();
    await node.server.detach(1);
    expect((await outcomes).map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected']);
    expect(node.opening).toHaveLength(1);
    expect(node.attached).toEqual([]);
  });

  it('is attached by who asks afterwards', async () => {
    const node = new Node();
    const first = node.attach().catch(() => undefined);
    await soon();
    const detaching = node.server.detach(1);
    const second = node.attach();
    await first;
    await detaching;
    await soon();
    node.opening[1]?.answer();
    expect((await second).device?.path).toBe('/fuse/layer-1');
    expect(node.attached).toEqual([1]);
    expect(await node.server.detach(1)).toBe(true);
    expect(node.attached).toEqual([]);
    expect(node.closed).toBe(1);
  });

  it('at the moment its readers are there is closed and never becomes a device', async () => {
    const node = new Node();
    const attaching = node.attach();
    attaching.catch(() => undefined);
    await soon();
    node.opening[0]?.answer();
    const detaching = node.server.detach(1);
    await expect(attaching).rejects.toMatchObject({ kind: 'closed' });
    expect(await detaching).toBe(false);
    expect(node.attached).toEqual([]);
    expect(node.closed).toBe(1);
  });

  it('does not disturb another layer', async () => {
    const node = new Node();
    const other = node.attach(2);
    await soon();
    await node.server.detach(1);
    node.opening[0]?.answer();
    await other;
    expect(node.attached).toEqual([2]);
  });
});

describe('an attach that fails', () => {
  it('leaves the layer to be attached again', async () => {
    const node = new Node();
    const failing = node.attach();
    await soon();
    node.opening[0]?.fail(new Error('registry is down'));
    await expect(failing).rejects.toThrow('registry is down');
    const again = node.attach();
    await soon();
    node.opening[1]?.answer();
    await again;
    expect(node.attached).toEqual([1]);
  });
});
