/**
 * Connections that are lent to the thread for cached layers: what it answers is right, and what it should not answer comes back.
 */
import { randomInt } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import path from 'node:path';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { DirectServing } from '../blobserve/attach/direct-serving.js';
import { NbdCommand, NbdError } from '../blobserve/attach/nbd-protocol.js';
import { NbdServer } from '../blobserve/attach/nbd-server.js';
import { ReplyMemory } from '../blobserve/attach/reply-memory.js';
import { socketpair } from '../blobserve/linux/socketpair.js';
import { ReadError } from '../blobserve/readers/blob-reader.js';
import { CacheReader } from '../blobserve/readers/cache.js';
import { GuardReader } from '../blobserve/readers/guard.js';
import { ReadaheadReader } from '../blobserve/readers/readahead.js';
import { ReadingRecord } from '../blobserve/readers/reading-record.js';
import { RecordedReader } from '../blobserve/readers/recorded.js';
import { DISK, READS_NOW } from '../blobserve/readers/testing/page-cache.js';
import { NbdClient } from '../blobserve/testing/nbd-client.js';
import { MemoryBlob } from './memory-blob.js';

const SIZE = 2 ** 20;
const SPAN = 4096;
const DIGEST = `sha256:${'7'.repeat(64)}`;
const program = new URL('../dist/blobserve/attach/direct-thread.js', import.meta.url);
/** Dies of the first connection that it gets. */
const FAILING = new URL(
  `data:text/javascript,${encodeURIComponent(
    "import { parentPort } from 'node:worker_threads'; parentPort.on('message', () => process.exit(1)); parentPort.postMessage('ready');",
  )}`,
);
const log = pino({ level: 'silent' });

/** Neighbours, sectors and spans differ, and no byte is 0. */
const CONTENT = Buffer.from(
  Uint8Array.from({ length: SIZE }, (_, at) => 1 + ((at ^ (at >> 8) ^ (at >> 15)) % 255)),
);

/** A layer's readers over a blob that is all in the cache, served, and somebody who reads. */
class Node {
  readonly directory = mkdtempSync(path.join(DISK, 'erofs-nbd-direct-'));
  readonly record = new ReadingRecord();
  readonly direct: DirectServing;
  readonly errors: unknown[] = [];
  loans = 0;
  /** Whether the connection is lent at this moment. */
  lent = false;
  /** Called before the blob is asked for bytes that the cache has not. */
  beforeFetch: () => Promise<void> | void = () => undefined;
  cache!: CacheReader;
  guard!: GuardReader;
  server!: NbdServer;
  client!: NbdClient;
  #cookie = 0;

  constructor(thread = program) {
    this.direct = new DirectServing(log, thread);
  }

  async start(): Promise<void> {
    const blob = new MemoryBlob(CONTENT, () => this.beforeFetch());
    this.cache = await CacheReader.open(blob, { dir: this.directory, digest: DIGEST, spanSize: SPAN, log });
    await this.fillCache();
    this.guard = new GuardReader(new ReadaheadReader(this.cache));
    const [ours, theirs] = socketpair();
    this.server = new NbdServer(ours, new RecordedReader(this.guard, this.record), {
      memory: new ReplyMemory(8 * SIZE),
      onReadError: (error) => this.errors.push(error),
      direct: {
        lend: (descriptor, file, onBack) => {
          const connection = this.direct.lend(descriptor, file, (rest) => {
            this.lent = false;
            onBack(rest);
          });
          if (connection !== undefined) {
            this.loans++;
            this.lent = true;
          }
          return connection;
        },
      },
    });
    this.client = new NbdClient(theirs);
  }

  async fillCache(): Promise<void> {
    await this.cache.read(Buffer.alloc(SIZE), 0);
    await this.cache.settled();
    expect(this.cache.allCached).toBe(true);
  }

  async end(): Promise<void> {
    this.server.close();
    this.client.destroy();
    this.direct.close();
    await this.guard.close();
    rmSync(this.directory, { recursive: true });
  }

  /** @returns the error of the answer; bytes are compared */
  async read(offset: number, length: number): Promise<number> {
    const cookie = ++this.#cookie;
    this.client.read(cookie, offset, length);
    const [reply] = await this.client.replies(1);
    expect(reply?.cookie).toBe(cookie);
    if (reply?.error === 0) expect(reply.data.equals(CONTENT.subarray(offset, offset + length))).toBe(true);
    return reply?.error ?? -1;
  }

  async untilLent(): Promise<void> {
    const { loans } = this;
    const deadline = Date.now() + 30_000;
    while (this.loans === loans) {
      expect(Date.now()).toBeLessThan(deadline);
      expect(await this.read(SPAN * randomInt(SIZE / SPAN), SPAN)).toBe(0);
    }
  }
}

describe.skipIf(!READS_NOW)('a connection lent to the thread for cached layers', () => {
  let node: Node;
  beforeEach(async () => {
    node = new Node();
    await node.start();
    await node.untilLent();
  });
  afterEach(() => node.end());

  it('has its reads answered right, of every length and place, and counted', async () => {
    const before = node.server.statistics();
    let bytes = 0;
    for (let round = 0; round < 300; round++) {
      const offset = randomInt(SIZE);
      const length = 1 + randomInt(SIZE - offset);
      bytes += length;
      expect(await node.read(offset, length)).toBe(0);
    }
    const { reads, readBytes } = node.server.statistics();
    expect([reads - before.reads, readBytes - before.readBytes]).toEqual([300, bytes]);
  });

  it('comes back with a read whose bytes the cache has let go of, which is answered with the right ones', async () => {
    node.beforeFetch = () => expect(node.lent).toBe(false);
    node.cache.distrust(5 * SPAN, 1);
    expect(await node.read(4 * SPAN, 3 * SPAN)).toBe(0);
    expect(node.lent).toBe(false);
    await node.fillCache();
    await node.untilLent();
  });

  it('comes back when the layer is refused: no byte of it is answered any more', async () => {
    node.guard.refuse(new ReadError('corrupt', 'it lies'));
    expect(await node.read(0, SPAN)).toBe(NbdError.EIO);
    expect(node.errors).toHaveLength(1);
    const { loans } = node;
    for (let round = 0; round < 100; round++) expect(await node.read(0, SPAN)).toBe(NbdError.EIO);
    expect(node.loans).toBe(loans);
  });

  it('comes back when somebody wants to see every read, and goes again when he has seen enough', async () => {
    const seen: number[] = [];
    const end = node.record.watch((offset) => seen.push(offset));
    const offsets = Array.from({ length: 100 }, () => randomInt(SIZE - SPAN));
    for (const offset of offsets) expect(await node.read(offset, 512)).toBe(0);
    expect(seen).toEqual(offsets);
    end();
    await node.untilLent();
  });

  it('comes back with what is no read of the device, in the order in which it was asked', async () => {
    const { client } = node;
    client.send(
      client.request(NbdCommand.READ, 1001, 0, SPAN),
      client.request(NbdCommand.READ, 1002, SIZE - 512, 1024),
      client.request(NbdCommand.READ, 1003, SPAN, SPAN),
      client.request(NbdCommand.WRITE, 1004, 0, 64, Buffer.alloc(64)),
      client.request(NbdCommand.READ, 1005, 2 * SPAN, 0),
      client.request(NbdCommand.READ, 1006, 2 * SPAN, SPAN),
    );
    const replies = await client.replies(6);
    expect(replies.map(({ cookie, error }) => [cookie, error])).toEqual([
      ...[
        [1001, 0],
        [1002, NbdError.EINVAL],
        [1003, 0],
        [1004, NbdError.EPERM],
      ],
      ...[
        [1005, NbdError.EINVAL],
        [1006, 0],
      ],
    ]);
    expect(replies[5]?.data.equals(CONTENT.subarray(2 * SPAN, 3 * SPAN))).toBe(true);
  });

  it('comes back with a request that is cut in two', async () => {
    const { client } = node;
    const bytes = client.request(NbdCommand.READ, 2001, SPAN, SPAN);
    for (let cut = 1; cut < bytes.length; cut++) {
      if (!node.lent) await node.untilLent();
      client.send(bytes.subarray(0, cut));
      while (node.lent) await new Promise((resolve) => setTimeout(resolve, 1));
      client.send(bytes.subarray(cut));
      const [reply] = await client.replies(1);
      expect(reply?.data.equals(CONTENT.subarray(SPAN, 2 * SPAN))).toBe(true);
      if (cut === 3) break; // each loan that was not worth it makes the next one later
    }
  });

  it('ends as any other: a good-bye, a client that hangs up, a server that is closed', async () => {
    node.client.send(node.client.request(NbdCommand.DISCONNECT, 3001, 0, 0));
    expect(await node.server.ended).toEqual({ reason: 'disconnected' });
    for (const who of ['client', 'server'] as const) {
      const other = new Node();
      await other.start();
      await other.untilLent();
      if (who === 'client') other.client.destroy();
      else other.server.close();
      expect(await other.server.ended).toEqual({ reason: who === 'client' ? 'hung up' : 'closed' });
      // Nobody holds a descriptor of the connection any more.
      if (who === 'server') await other.client.untilClosed();
      await other.end();
    }
  });

  it('is broken, for the kernel to make it anew, when the thread fails', async () => {
    const other = new Node(FAILING);
    await other.start();
    await other.untilLent();
    expect(await other.server.ended).toEqual({ reason: 'hung up' });
    await other.client.untilClosed();
    await other.end();
  });

  it('never answers a wrong byte while spans are taken away and come again, many reads at a time', async () => {
    const { client } = node;
    let cookie = 10_000;
    const deadline = Date.now() + 2000;
    while (Date.now() < deadline) {
      const asked = new Map<number, [number, number]>();
      const pieces = Array.from({ length: 1 + randomInt(40) }, () => {
        const offset = randomInt(SIZE - 1);
        const length = 1 + randomInt(Math.min(SIZE - offset, 20_000));
        asked.set(++cookie, [offset, length]);
        return client.request(NbdCommand.READ, cookie, offset, length);
      });
      client.send(...pieces);
      if (randomInt(20) === 0) node.cache.distrust(randomInt(SIZE), SPAN);
      for (const reply of await client.replies(asked.size)) {
        const [offset, length] = asked.get(reply.cookie) ?? [0, 0];
        asked.delete(reply.cookie);
        expect(reply.error).toBe(0);
        expect(reply.data.equals(CONTENT.subarray(offset, offset + length))).toBe(true);
      }
    }
    expect(node.errors).toEqual([]);
  });
});
