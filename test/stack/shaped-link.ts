/**
 * A link in user space: a TCP proxy on loopback that lets bytes through at a rate, shared by all connections as they share a
 * wire, and so late as they would be at the other end of it. A connection costs a round trip before its first byte. What
 * it does not imitate is TCP itself: no slow start, no loss.
 */
import { once } from 'node:events';
import net, { type AddressInfo } from 'node:net';

export interface ShapedLink {
  /** `127.0.0.1:port` */
  readonly address: string;
  stop(): Promise<void>;
}

export interface LinkShape {
  /** Bits per second, in the direction of the client. */
  readonly bitsPerSecond: number;
  /** Milliseconds for a question and its answer. */
  readonly roundTripMs: number;
}

/** Bytes that leave together. */
const PIECE = 16 * 1024;
/** Bytes of one connection on their way, before it is not read from any more. */
const QUEUE_MAX = 1024 * 1024;

/** @param upstream `host:port` of what is at the other end */
export async function startShapedLink(upstream: string, shape: LinkShape): Promise<ShapedLink> {
  const [host = '', port = ''] = upstream.split(':');
  const oneWay = shape.roundTripMs / 2;
  const sockets = new Set<net.Socket>();
  const timers = new Set<NodeJS.Timeout>();
  /** When the wire is free again, in milliseconds of performance.now(). */
  let free = 0;

  /** Hands on what comes, in order, each piece when `arrival` says. */
  const carry = (from: net.Socket, to: net.Socket, arrival: (bytes: number) => number): void => {
    const queue: { readonly due: number; readonly bytes: number; readonly deliver: () => void }[] = [];
    let queued = 0;
    let timer: NodeJS.Timeout | undefined;
    const deliver = (): void => {
      if (timer !== undefined) timers.delete(timer);
      for (let head = queue[0]; head !== undefined && head.due <= performance.now(); head = queue[0]) {
        queue.shift();
        queued -= head.bytes;
        head.deliver();
      }
      if (queued <= QUEUE_MAX / 2) from.resume();
      const [next] = queue;
      if (next === undefined) return;
      timer = setTimeout(deliver, Math.max(1, next.due - performance.now()));
      timers.add(timer);
    };
    const enqueue = (due: number, bytes: number, action: () => void): void => {
      queued += bytes;
      if (queue.push({ due, bytes, deliver: action }) === 1) deliver();
    };
    from.on('data', (chunk: Buffer) => {
      for (let start = 0; start < chunk.length; start += PIECE) {
        const piece = chunk.subarray(start, start + PIECE);
        enqueue(arrival(piece.length), piece.length, () => !to.destroyed && to.write(piece));
      }
      if (queued > QUEUE_MAX) from.pause();
    });
    from.on('end', () => enqueue(arrival(0), 0, () => to.end()));
    from.on('error', () => to.destroy());
    from.on('close', () => enqueue(arrival(0), 0, () => to.destroy()));
  };

  const server = net.createServer((client) => {
    const registry = net.connect({ host, port: Number(port), noDelay: true });
    client.setNoDelay(true);
    for (const socket of [client, registry]) {
      sockets.add(socket);
      socket.on('close', () => sockets.delete(socket));
    }
    const opened = performance.now();
    carry(client, registry, () => Math.max(performance.now(), opened + shape.roundTripMs) + oneWay);
    carry(registry, client, (bytes) => {
      free = Math.max(free, performance.now()) + (bytes * 8 * 1000) / shape.bitsPerSecond;
      return free + oneWay;
    });
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    address: `127.0.0.1:${(server.address() as AddressInfo).port}`,
    stop: async () => {
      const closed = once(server, 'close');
      server.close();
      for (const timer of timers) clearTimeout(timer);
      for (const socket of sockets) socket.destroy();
      await closed;
    },
  };
}
