/** What the benchmarks of slow links rely on. */
import { once } from 'node:events';
import net, { type AddressInfo } from 'node:net';
import { afterEach, describe, expect, test } from 'vitest';
import { patience } from '../patience.js';
import { startShapedLink, type ShapedLink } from './shaped-link.js';

const SHAPE = { bitsPerSecond: 50e6, roundTripMs: 20 };

let link: ShapedLink | undefined;
let server: net.Server | undefined;

/** A server that answers a number, on a line, with so many bytes. */
async function start(): Promise<ShapedLink> {
  server = net.createServer((socket) => {
    socket.on('data', (chunk: Buffer) => {
      for (const line of chunk.toString().split('\n').filter(Boolean))
        socket.write(Buffer.alloc(Number(line), 1));
    });
    socket.on('error', () => undefined);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  link = await startShapedLink(`127.0.0.1:${(server.address() as AddressInfo).port}`, SHAPE);
  return link;
}

afterEach(async () => {
  await link?.stop();
  server?.close();
});

/** A connection that asks for bytes again and again. */
async function connect({ address }: ShapedLink): Promise<(bytes: number) => Promise<number>> {
  const [host = '', port = ''] = address.split(':');
  const socket = net.connect({ host, port: Number(port) });
  await once(socket, 'connect');
  return (bytes) =>
    new Promise((resolve, reject) => {
      const asked = performance.now();
      let got = 0;
      const take = (chunk: Buffer): void => {
        got += chunk.length;
        if (got < bytes) return;
        socket.off('data', take);
        resolve(performance.now() - asked);
      };
      socket.on('data', take);
      socket.once('error', reject);
      socket.write(`${bytes}\n`);
    });
}

describe('a link of 50 Mbit/s and 20 ms', () => {
  test('answers after a round trip, the first time after two', async () => {
    const ask = await connect(await start());
    expect(await ask(1)).toBeGreaterThanOrEqual(39);
    expect(await ask(1)).toBeGreaterThanOrEqual(19);
  });

  test('lets no more through than its rate, over one connection or over many, and counts it', async () => {
    const shaped = await start();
    const one = await connect(shaped);
    const milliseconds = (bytes: number): number => (bytes * 8000) / SHAPE.bitsPerSecond;
    const alone = await one(2_000_000);
    expect(alone).toBeGreaterThan(milliseconds(2_000_000));
    expect(alone).toBeLessThan(patience(10) * milliseconds(2_000_000));
    const many = await Promise.all(Array.from({ length: 16 }, () => connect(shaped)));
    const started = performance.now();
    await Promise.all(many.map((ask) => ask(200_000)));
    const together = performance.now() - started;
    expect(together).toBeGreaterThan(milliseconds(16 * 200_000));
    expect(together).toBeLessThan(patience(10) * milliseconds(16 * 200_000));
    expect(shaped.bytes()).toBe(2_000_000 + 16 * 200_000);
  });

  test('does not have a small answer wait behind the large ones of others', async () => {
    const shaped = await start();
    const small = await connect(shaped);
    await small(1);
    const large = await Promise.all(Array.from({ length: 8 }, () => connect(shaped)));
    const all = Promise.all(large.map((ask) => ask(1_000_000)));
    await expect.poll(() => shaped.bytes()).toBeGreaterThan(1_000_000);
    const before = shaped.bytes();
    await small(1000);
    // A piece of each of the others goes before it, and what passes in a round trip, not the megabytes of theirs.
    expect(shaped.bytes() - before).toBeLessThan(2_000_000);
    await all;
  });

  test('sends nothing on for a client that has gone', async () => {
    const shaped = await start();
    const [host = '', port = ''] = shaped.address.split(':');
    const socket = net.connect({ host, port: Number(port) });
    socket.write('5000000\n');
    await once(socket, 'data');
    socket.destroy();
    const ask = await connect(shaped);
    await ask(100_000);
    expect(shaped.bytes()).toBeLessThan(2_000_000);
  });
});
