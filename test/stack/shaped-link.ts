/**
 * A link in user space: a TCP proxy on loopback that lets bytes through at a rate and so late as they would be at the other
 * end of it. Connections share the rate fairly, a piece of each in turn, as flows of TCP come to share a wire; what one has
 * queued does not hold up another. A connection costs a round trip before its first byte. What it does not imitate is
 * TCP itself: no slow start, no loss.
 */
import { once } from 'node:events';
import net, { type AddressInfo } from 'node:net';

export interface ShapedLink {
  /** `127.0.0.1:port` */
  readonly address: string;
  /** Bytes that went over the wire to clients so far, of all connections, headers included. */
  bytes(): number;
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
/** Bytes of one connection that wait for the wire, before it is not read from any more. */
const BACKLOG_MAX = 256 * 1024;
/** Bytes of one connection on their way or not taken by the client yet: a window of TCP. */
const WINDOW = 1024 * 1024;
/** Milliseconds for which the wire is given work ahead of time: timers are no more exact. */
const AHEAD_MS = 2;

type Action = () => void;

/** Does things in order, each at its moment, which is never before that of the one before it. */
class DelayLine {
  readonly #queue: { readonly due: number; readonly action: Action }[] = [];
  #timer: NodeJS.Timeout | undefined;

  /** @param due milliseconds of performance.now() */
  add(due: number, action: Action): void {
    if (this.#queue.push({ due, action }) === 1) this.#run();
  }

  clear(): void {
    clearTimeout(this.#timer);
    this.#queue.length = 0;
  }

  readonly #run = (): void => {
    while ((this.#queue[0]?.due ?? Infinity) <= performance.now()) this.#queue.shift()?.action();
    const [next] = this.#queue;
    if (next !== undefined) this.#timer = setTimeout(this.#run, Math.max(1, next.due - performance.now()));
  };
}

/** What the registry sends over one connection. */
interface Flow {
  readonly backlog: Buffer[];
  waiting: number;
  inFlight: number;
  ended: boolean;
  /** Whether it is among those that the wire takes from in turn. */
  queued: boolean;
  readonly client: net.Socket;
  readonly registry: net.Socket;
  readonly line: DelayLine;
}

/** The wire to the clients. */
class Wire {
  bytes = 0;
  readonly #flows: Flow[] = [];
  /** When it is free again, in milliseconds of performance.now(). */
  #free = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(private readonly shape: LinkShape) {}

  /** To be called whenever the flow may have something to send, or be able to again. */
  offer(flow: Flow): void {
    if (!flow.queued) this.#flows.push(flow);
    flow.queued = true;
    if (this.#timer === undefined) this.#pump();
  }

  stop(): void {
    clearTimeout(this.#timer);
    this.#flows.length = 0;
  }

  readonly #pump = (): void => {
    this.#timer = undefined;
    for (let flow = this.#flows[0]; flow !== undefined; flow = this.#flows[0]) {
      const ahead = this.#free - performance.now();
      if (ahead > AHEAD_MS) {
        this.#timer = setTimeout(this.#pump, ahead);
        return;
      }
      this.#flows.shift();
      flow.queued = false;
      if (this.#send(flow)) {
        flow.queued = true;
        this.#flows.push(flow);
      }
    }
  };

  /** Sends a piece. @returns whether the flow may have another */
  #send(flow: Flow): boolean {
    const { client, registry, line } = flow;
    const arrival = (): number => Math.max(this.#free, performance.now()) + this.shape.roundTripMs / 2;
    // A full window is offered again when the client has taken something.
    if (client.destroyed || flow.inFlight + client.writableLength > WINDOW) return false;
    const piece = flow.backlog.shift();
    if (piece === undefined) {
      if (flow.ended) line.add(arrival(), () => client.end());
      return false;
    }
    this.#free = Math.max(this.#free, performance.now()) + (piece.length * 8000) / this.shape.bitsPerSecond;
    this.bytes += piece.length;
    flow.waiting -= piece.length;
    flow.inFlight += piece.length;
    line.add(arrival(), () => {
      flow.inFlight -= piece.length;
      if (!client.destroyed) client.write(piece, () => this.offer(flow));
    });
    if (flow.waiting < BACKLOG_MAX / 2) registry.resume();
    return true;
  }
}

/** @param upstream `host:port` of what is at the other end */
export async function startShapedLink(upstream: string, shape: LinkShape): Promise<ShapedLink> {
  const [host = '', port = ''] = upstream.split(':');
  const sockets = new Set<net.Socket>();
  const lines = new Set<DelayLine>();
  const wire = new Wire(shape);

  const server = net.createServer((client) => {
    const registry = net.connect({ host, port: Number(port), noDelay: true });
    client.setNoDelay(true);
    const [up, down] = [new DelayLine(), new DelayLine()];
    for (const line of [up, down]) lines.add(line);
    for (const socket of [client, registry]) {
      sockets.add(socket);
      socket.on('close', () => sockets.delete(socket));
    }

    // Questions are small: they are late, and cost nothing of the rate.
    const opened = performance.now();
    const arrival = (): number =>
      Math.max(performance.now(), opened + shape.roundTripMs) + shape.roundTripMs / 2;
    let asking = 0;
    client.on('data', (chunk: Buffer) => {
      asking += chunk.length;
      if (asking > WINDOW) client.pause();
      up.add(arrival(), () => {
        asking -= chunk.length;
        if (!registry.destroyed) registry.write(chunk);
        client.resume();
      });
    });
    client.on('end', () => up.add(arrival(), () => registry.end()));
    client.on('error', () => undefined);
    client.on('close', () => {
      for (const line of [up, down]) {
        line.clear();
        lines.delete(line);
      }
      registry.destroy();
    });

    const flow: Flow = {
      ...{ backlog: [], waiting: 0, inFlight: 0, ended: false, queued: false },
      ...{ client, registry, line: down },
    };
    registry.on('data', (chunk: Buffer) => {
      for (let start = 0; start < chunk.length; start += PIECE)
        flow.backlog.push(chunk.subarray(start, start + PIECE));
      flow.waiting += chunk.length;
      if (flow.waiting > BACKLOG_MAX) registry.pause();
      wire.offer(flow);
    });
    registry.on('error', () => client.destroy());
    registry.on('end', () => {
      flow.ended = true;
      wire.offer(flow);
    });
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    address: `127.0.0.1:${(server.address() as AddressInfo).port}`,
    bytes: () => wire.bytes,
    stop: async () => {
      const closed = once(server, 'close');
      server.close();
      wire.stop();
      for (const line of lines) line.clear();
      for (const socket of sockets) socket.destroy();
      await closed;
    },
  };
}
