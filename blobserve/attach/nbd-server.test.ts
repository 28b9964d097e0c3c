import { closeSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { socketpair } from '../linux/socketpair.js';
import type { BlobReader } from '../readers/blob-reader.js';
import { NbdClient as Client } from '../testing/nbd-client.js';
import { NbdCommand, NbdError } from './nbd-protocol.js';
import { NbdServer, type NbdServerOptions } from './nbd-server.js';
import { ReplyMemory } from './reply-memory.js';

const SIZE = 1024 * 1024;

/** Byte at a place of the test blob: neighbours and blocks differ. */
function byteAt(offset: number): number {
  return (offset ^ (offset >> 8) ^ (offset >> 15)) & 0xff;
}

function content(offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let index = 0; index < length; index++) {
    bytes[index] = byteAt(offset + index);
  }
  return bytes;
}

/** A reader whose asynchronous reads are answered by the test, one by one. */
class TestReader implements BlobReader {
  readonly size = SIZE;
  /** Reads below this offset are answered at once. */
  inMemory = 0;
  readonly pending: { offset: number; length: number; finish: () => void; fail: (error: Error) => void }[] =
    [];
  #wake: (() => void) | undefined;

  read(target: Buffer, offset: number): Promise<void> {
    return new Promise((resolve, reject) => {
      this.pending.push({
        offset,
        length: target.length,
        finish: () => {
          content(offset, target.length).copy(target);
          resolve();
        },
        fail: reject,
      });
      this.#wake?.();
    });
  }

  readNow(target: Buffer, offset: number): boolean {
    if (offset + target.length > this.inMemory) {
      // Says no only after it has spoilt the target, as it may.
      target.fill(0xee);
      return false;
    }
    content(offset, target.length).copy(target);
    return true;
  }

  /** Resolves when `count` reads are waiting to be answered. */
  async waitForPending(count: number): Promise<void> {
    while (this.pending.length < count) {
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

const opened: { server: NbdServer; client: Client }[] = [];
afterEach(() => {
  for (const { server, client } of opened.splice(0)) {
    server.close();
    client.destroy();
  }
});

function start(
  reader: BlobReader,
  options: Partial<NbdServerOptions> = {},
): { server: NbdServer; client: Client } {
  const [ours, theirs] = socketpair();
  const pair = {
    server: new NbdServer(ours, reader, { memory: new ReplyMemory(8 * SIZE), ...options }),
    client: new Client(theirs),
  };
  opened.push(pair);
  return pair;
}

describe('the nbd server', () => {
  it('answers reads of bytes at hand with exactly those bytes', async () => {
    const reader = new TestReader();
    reader.inMemory = SIZE;
    const { server, client } = start(reader);
    const wanted: [number, number][] = [
      [0, 512],
      [512, 4096],
      [SIZE - 512, 512],
      [3, 1],
      [0, SIZE],
      [4096, 131072],
    ];
    client.send(
      ...wanted.map(([offset, length], index) => client.request(NbdCommand.READ, index, offset, length)),
    );
    for (const { cookie, error, data } of await client.replies(wanted.length)) {
      const [offset, length] = wanted[cookie] ?? [0, 0];
      expect(error).toBe(NbdError.NONE);
      expect(data.equals(content(offset, length))).toBe(true);
    }
    expect(server.statistics()).toMatchObject({ reads: 6, readErrors: 0, readsInFlight: 0, oldestReadMs: 0 });
    expect(server.statistics().readBytes).toBe(512 + 4096 + 512 + 1 + SIZE + 131072);
    expect(reader.pending).toHaveLength(0);
  });

  it('answers many requests sent at once, in any pieces', async () => {
    const reader = new TestReader();
    reader.inMemory = SIZE;
    const { client } = start(reader, { memory: new ReplyMemory(256 * 1024), maxReadsInFlight: 4 });
    const count = 2000;
    const requests = Array.from({ length: count }, (_, index) =>
      client.request(NbdCommand.READ, index, (index * 512) % SIZE, 512),
    );
    const stream = Buffer.concat(requests);
    for (let at = 0; at < stream.length; at += 1009) {
      client.send(stream.subarray(at, at + 1009));
    }
    const replies = await client.replies(count);
    expect(new Set(replies.map((reply) => reply.cookie)).size).toBe(count);
    for (const { cookie, data } of replies) {
      expect(data.equals(content((cookie * 512) % SIZE, 512))).toBe(true);
    }
  });

  it('answers slow reads in the order they are done, others meanwhile', async () => {
    const reader = new TestReader();
    reader.inMemory = 65536;
    const { server, client } = start(reader);
    client.read(1, 65536, 4096);
    client.read(2, 131072, 4096);
    await reader.waitForPending(2);
    client.read(3, 0, 4096);
    expect((await client.replies(1)).map((reply) => reply.cookie)).toEqual([3]);
    expect(server.statistics()).toMatchObject({ reads: 1, readsInFlight: 2 });
    expect(server.statistics().oldestReadMs).toBeGreaterThan(0);
    reader.pending[1]?.finish();
    expect(await client.replies(1)).toEqual([{ error: 0, cookie: 2, data: content(131072, 4096) }]);
    reader.pending[0]?.finish();
    expect(await client.replies(1)).toEqual([{ error: 0, cookie: 1, data: content(65536, 4096) }]);
    expect(server.statistics()).toMatchObject({ reads: 3, readsInFlight: 0, oldestReadMs: 0 });
  });

  it('fails one read alone, and goes on', async () => {
    const reader = new TestReader();
    const failures: unknown[] = [];
    const { server, client } = start(reader, {
      onReadError: (error, offset, length) => failures.push([(error as Error).message, offset, length]),
    });
    client.read(1, 0, 4096);
    client.read(2, 4096, 4096);
    await reader.waitForPending(2);
    reader.pending[0]?.fail(new Error('registry away'));
    reader.pending[1]?.finish();
    const replies = await client.replies(2);
    expect(replies.find((reply) => reply.cookie === 1)).toMatchObject({ error: NbdError.EIO });
    expect(replies.find((reply) => reply.cookie === 2)).toMatchObject({
      error: 0,
      data: content(4096, 4096),
    });
    expect(failures).toEqual([['registry away', 0, 4096]]);
    expect(server.statistics()).toMatchObject({ reads: 2, readBytes: 4096, readErrors: 1, readsInFlight: 0 });
  });

  it('fails a read whose reader throws', async () => {
    const reader = new TestReader();
    reader.readNow = () => {
      throw new Error('closed');
    };
    const { client } = start(reader);
    client.read(1, 0, 512);
    expect(await client.replies(1)).toMatchObject([{ error: NbdError.EIO }]);
  });

  it('refuses reads that are not inside the device, without asking the reader', async () => {
    const reader = new TestReader();
    const { client } = start(reader);
    client.read(1, SIZE - 511, 512);
    client.read(2, SIZE, 512);
    client.read(3, 2 ** 52, 512);
    client.read(4, 0, 0);
    client.read(5, 0, SIZE + 1);
    for (const reply of await client.replies(5)) {
      expect(reply.error).toBe(NbdError.EINVAL);
    }
    expect(reader.pending).toHaveLength(0);
  });

  it('refuses whatever would change the device, and swallows the payload', async () => {
    const { client } = start(new TestReader());
    // A payload that would be a good-bye if it were taken for a request.
    const payload = client.request(NbdCommand.DISCONNECT, 99, 0, 0);
    client.send(
      client.request(NbdCommand.WRITE, 1, 0, payload.length, payload),
      client.request(NbdCommand.TRIM, 2, 0, 512),
      client.request(NbdCommand.WRITE_ZEROES, 3, 0, 512),
      client.request(NbdCommand.FLUSH, 4, 0, 0),
      client.request(77, 5, 0, 512),
    );
    const { EPERM, NONE, EINVAL } = NbdError;
    expect((await client.replies(5)).map((reply) => reply.error)).toEqual([
      EPERM,
      EPERM,
      EPERM,
      NONE,
      EINVAL,
    ]);
  });

  it('ends when the client says good-bye', async () => {
    const { server, client } = start(new TestReader());
    client.send(client.request(NbdCommand.DISCONNECT, 1, 0, 0));
    expect(await server.ended).toEqual({ reason: 'disconnected' });
    await client.untilClosed();
  });

  it('ends when the other end is closed, with reads under way', async () => {
    const reader = new TestReader();
    const memory = new ReplyMemory(8 * SIZE);
    const { server, client } = start(reader, { memory });
    client.read(1, 0, 4096);
    await reader.waitForPending(1);
    client.destroy();
    expect(await server.ended).toEqual({ reason: 'hung up' });
    expect(server.statistics().readsInFlight).toBe(0);
    // The buffer is the reader's until the read is over.
    expect(memory.usedBytes).toBeGreaterThan(0);
    const given = new Promise<void>((resolve) => memory.whenGiven(resolve));
    reader.pending[0]?.finish();
    await given;
    expect(memory.usedBytes).toBe(0);
  });

  it('ends the connection on bytes that are not the protocol', async () => {
    const { server, client } = start(new TestReader());
    client.send(Buffer.alloc(28, 0x41));
    expect(await server.ended).toMatchObject({
      reason: 'failed',
      error: { message: 'nbd request begins with 0x41414141, not 0x25609513' },
    });
    await client.untilClosed();
  });

  it('ends the connection on a request longer than the maximum', async () => {
    const { server, client } = start(new TestReader(), { maxRequestLength: 65536 });
    client.read(1, 0, 65537);
    expect(await server.ended).toMatchObject({ reason: 'failed' });
  });

  it('ends when it is closed', async () => {
    const { server, client } = start(new TestReader());
    server.close();
    expect(await server.ended).toEqual({ reason: 'closed' });
    await client.untilClosed();
    server.close();
  });

  it('keeps the buffers of all reads below the bound, and serves every read', async () => {
    const reader = new TestReader();
    const limit = 300 * 1024;
    const memory = new ReplyMemory(limit);
    const { client } = start(reader, { memory });
    const count = 40;
    for (let cookie = 0; cookie < count; cookie++) {
      client.read(cookie, cookie * 512, 65536);
    }
    for (let done = 0; done < count; done++) {
      await reader.waitForPending(done + 1);
      expect(reader.pending.length - done).toBeLessThanOrEqual(4);
      expect(memory.usedBytes + memory.idleBytes).toBeLessThanOrEqual(limit);
      reader.pending[done]?.finish();
      const [reply] = await client.replies(1);
      expect(reply?.data.equals(content((reply.cookie ?? 0) * 512, 65536))).toBe(true);
    }
    expect(memory.usedBytes).toBe(0);
  });

  it('lets every device have one read when others hold all memory', async () => {
    const memory = new ReplyMemory(70_000);
    const stuck = new TestReader();
    const first = start(stuck, { memory });
    first.client.read(1, 0, 65536);
    await stuck.waitForPending(1);
    const reader = new TestReader();
    reader.inMemory = SIZE;
    const second = start(reader, { memory });
    second.client.read(1, 0, 65536);
    second.client.read(2, 0, 65536);
    expect(await second.client.replies(2)).toHaveLength(2);
  });

  it('stops reading ahead for a client that does not take its replies', async () => {
    const reader = new TestReader();
    reader.inMemory = SIZE;
    const memory = new ReplyMemory(64 * SIZE);
    const { server, client } = start(reader, { memory, maxReadsInFlight: 1000 });
    client.pause();
    const count = 64;
    for (let cookie = 0; cookie < count; cookie++) {
      client.read(cookie, 0, SIZE);
    }
    // Everything the server will do without the client taking a byte is done when a second device has been served.
    const other = start(reader);
    for (let round = 0; round < 20; round++) {
      other.client.read(round, 0, 4096);
      await other.client.replies(1);
    }
    expect(server.statistics().reads).toBeLessThanOrEqual(8);
    expect(memory.usedBytes).toBeLessThan(8.1 * SIZE);
    client.resume();
    const replies = await client.replies(count);
    expect(replies.every((reply) => reply.data.equals(content(0, SIZE)))).toBe(true);
  });

  it('does not grow for a client that sends bad requests and takes no replies', async () => {
    const reader = new TestReader();
    reader.inMemory = SIZE;
    const { server, client } = start(reader);
    client.pause();
    const bad = Buffer.concat(
      Array.from({ length: 1000 }, (_, index) => client.request(NbdCommand.READ, index, 0, 0)),
    );
    const rounds = 200;
    for (let round = 0; round < rounds; round++) {
      client.send(bad);
    }
    const other = start(reader);
    for (let round = 0; round < 200; round++) {
      other.client.read(round, 0, 4096);
      await other.client.replies(1);
    }
    expect(server.statistics().reads).toBeLessThan(rounds * 1000);
    client.resume();
    await client.replies(rounds * 1000);
  });

  it('works on a descriptor whose other end was closed before', async () => {
    const [ours, theirs] = socketpair();
    closeSync(theirs);
    const server = new NbdServer(ours, new TestReader(), { memory: new ReplyMemory(SIZE) });
    expect(await server.ended).toEqual({ reason: 'hung up' });
  });
});

describe('reply memory', () => {
  it('hands the same buffers out again', () => {
    const memory = new ReplyMemory(SIZE);
    const first = memory.take(4096);
    expect(first?.data).toHaveLength(4096);
    expect(first?.message).toHaveLength(4096 + 16);
    if (first !== undefined) {
      memory.give(first);
    }
    const second = memory.take(3000);
    expect(second).toBe(first);
    expect(second?.data).toHaveLength(3000);
    expect(second?.message).toHaveLength(3016);
    expect(second?.data.byteOffset).toBe((second?.message.byteOffset ?? 0) + 16);
  });

  it('says no at the limit, yes to the one read that must go on, and drops idle buffers for busy ones', () => {
    const memory = new ReplyMemory(3 * (65536 + 16));
    const taken = [memory.take(65536), memory.take(65536), memory.take(65536)];
    expect(memory.take(1)).toBeUndefined();
    expect(memory.take(1, true)).toBeDefined();
    for (const buffer of taken) {
      if (buffer !== undefined) {
        memory.give(buffer);
      }
    }
    expect(memory.idleBytes).toBeGreaterThan(0);
    expect(memory.take(131072)).toBeDefined();
    expect(memory.usedBytes + memory.idleBytes).toBeLessThanOrEqual(memory.limitBytes);
  });
});
