/**
 * The thread that answers the reads of layers whose bytes are all in their cache files (direct-serving.ts): of each device it has
 * a socket and the file. One loop of poll(2), recv(2), preadv2(2) and send(2), with nothing of Node between them.
 *
 * While one device alone is read, its socket is waited for by recv(2) itself: poll would be a fourth call for each read.
 *
 * It answers nothing but what needs no thought: reads inside the device, of spans that are ready, from the page cache. With
 * anything else the connection goes back, and the request with it. A reply leaves only when, after its bytes were read, their spans
 * are ready still and nobody has withdrawn the file: whoever changes bytes says so first.
 */
import { closeSync } from 'node:fs';
import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';
import koffi from 'koffi';
import { setNonBlocking, shutDown } from '../linux/descriptor.js';
import { poll, POLLIN, POLLOUT } from '../linux/poll.js';
import { preadv2, RWF_NOWAIT } from '../linux/pread.js';
import { MSG_DONTWAIT, MSG_NOSIGNAL, recv, send } from '../linux/socket-calls.js';
import { setReceiveTimeout } from '../linux/socketpair.js';
import { clockSeconds, SpanState } from '../readers/span-state.js';
import {
  DIRECT_CONNECTIONS_MAX,
  type DirectAnswer,
  type DirectOrder,
  type DirectThreadData,
} from './direct-orders.js';
import {
  decodeRequest,
  NBD_REPLY_LENGTH,
  NBD_REQUEST_LENGTH,
  NBD_REQUEST_MAGIC,
  NbdCommand,
  NbdError,
  writeReplyHeader,
} from './nbd-protocol.js';

type Connection = Exclude<DirectOrder, 'end'>;

/** Requests taken from one socket before the next has its turn. */
const REQUESTS_AT_ONCE = 16;
/** Longest read in bytes that is answered here; the kernel's are 1.25 MiB by default. */
const LONGEST_READ = 2 * 2 ** 20;
/** A kernel that takes nothing for so long is not there any more, in milliseconds. */
const SEND_PATIENCE = 10_000;
/** How long one socket is waited for without a look at what else there is, in milliseconds. */
const ALONE_WAIT = 5;
/** So that a process that ends need not wait for longer, in milliseconds. */
const LONGEST_WAIT = 1000;
/** The clock is asked after so many turns. */
const TURNS_PER_LOOK = 32;

const READY: number = SpanState.Ready;
const { EAGAIN, EINTR } = koffi.os.errno;

/** Memory that does not move, with its address for system calls. */
function memory(length: number): { readonly address: bigint; readonly bytes: ArrayBuffer } {
  const pointer: unknown = koffi.alloc('uint8_t', length);
  return { address: BigInt(koffi.address(pointer)), bytes: koffi.view(pointer, length) };
}

const requests = memory(NBD_REQUEST_LENGTH * REQUESTS_AT_ONCE);
const received = Buffer.from(requests.bytes);
/** Header and data, so that both leave in one call. */
const reply = memory(NBD_REPLY_LENGTH + LONGEST_READ);
const header = Buffer.from(reply.bytes, 0, NBD_REPLY_LENGTH);
/** struct iovec of <bits/types/struct_iovec.h>: address u64, length u64; of which only the length changes. */
const iovec = memory(16);
const target = new BigUint64Array(iovec.bytes);
target[0] = reply.address + BigInt(NBD_REPLY_LENGTH);
target[1] = 0n;
/** Below 2^32, so its lower half; a BigInt for each read would cost more. */
const LENGTH_WORD = 2;
const targetWords = new Uint32Array(iovec.bytes);
/** struct pollfd of <sys/poll.h>: descriptor i32, events i16, revents i16. */
const polled = memory(8 * (DIRECT_CONNECTIONS_MAX + 1));
const polledWords = new Int32Array(polled.bytes);
const waited = memory(8);
const waitedWords = new Int32Array(waited.bytes);

const port = parentPort;
if (port === null) throw new Error('this is a thread, not a program');
const { wake, orders } = workerData as DirectThreadData;
const connections: Connection[] = [];
let clockOffset = 0;
let seconds = 0;
let turns = 0;
/** Messages that were looked at. */
let ordersSeen = 0;

/** As `clockSeconds` of span-store.ts says in the thread that has sent us the file. */
function lookAtClock(): void {
  seconds = clockSeconds(performance.now() + clockOffset);
}

function giveBack(connection: Connection, from: number, end: number): void {
  connections.splice(connections.indexOf(connection), 1);
  closeSync(connection.file.fd);
  const rest = new Uint8Array(requests.bytes.slice(from, end));
  setNonBlocking(connection.socket);
  closeSync(connection.socket);
  port?.postMessage({ id: connection.id, rest } satisfies DirectAnswer);
}

function isWithdrawn({ withdrawn }: Connection['file']): boolean {
  for (const flag of withdrawn) if (Atomics.load(flag, 0) !== 0) return true;
  return false;
}

function areReady({ spanSize, states }: Connection['file'], offset: number, length: number): boolean {
  const last = Math.floor((offset + length - 1) / spanSize);
  for (let span = Math.floor(offset / spanSize); span <= last; span++)
    if (Atomics.load(states, span) !== READY) return false;
  return true;
}

/** @returns false when the socket is broken, perhaps in the middle of a reply */
function sendReply(socket: number, length: number): boolean {
  let at = reply.address;
  let left = length;
  for (;;) {
    const sent = send(socket, at, left, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent === left) return true;
    if (sent > 0) {
      at += BigInt(sent);
      left -= sent;
      continue;
    }
    const errno = koffi.errno();
    if (errno === EINTR) continue;
    if (errno !== EAGAIN) return false;
    waitedWords[0] = socket;
    waitedWords[1] = POLLOUT;
    if (poll(waited.address, 1, SEND_PATIENCE) === 0) return false;
  }
}

type Outcome =
  | 'answered'
  /** It is somebody else's to answer. */
  | 'left'
  /** Half a reply may have gone, and nothing that follows it could be understood. */
  | 'broken';

function answer({ socket, file, counts }: Connection, at: number): Outcome {
  const request = decodeRequest(received, at);
  const { type, offset, length } = request;
  if (type !== NbdCommand.READ || length === 0 || length > LONGEST_READ || offset + length > file.size)
    return 'left';
  targetWords[LENGTH_WORD] = length;
  if (preadv2(file.fd, iovec.address, 1, offset, RWF_NOWAIT) !== length) return 'left';
  // Only now: what is read of a span that was let go of meanwhile may be anything.
  if (isWithdrawn(file) || !areReady(file, offset, length)) return 'left';
  writeReplyHeader(header, NbdError.NONE, request);
  const last = Math.floor((offset + length - 1) / file.spanSize);
  for (let span = Math.floor(offset / file.spanSize); span <= last; span++) file.used[span] = seconds;
  // Before it is sent: who has the answer finds it counted.
  counts[0] = (counts[0] ?? 0) + 1;
  counts[1] = (counts[1] ?? 0) + length;
  return sendReply(socket, NBD_REPLY_LENGTH + length) ? 'answered' : 'broken';
}

/** What is cut off, or not the protocol, is for who has the whole stream. */
function isRequest(at: number, end: number): boolean {
  return end - at >= NBD_REQUEST_LENGTH && received.readUInt32BE(at) === NBD_REQUEST_MAGIC;
}

/**
 * Answers what has come.
 *
 * @param flags MSG_DONTWAIT, or 0 to wait for it
 * @returns false when nothing has
 */
function serve(connection: Connection, flags: number): boolean {
  const { socket } = connection;
  const end = recv(socket, requests.address, received.length, flags);
  if (end < 0 && (koffi.errno() === EAGAIN || koffi.errno() === EINTR)) return false;
  if (end <= 0) {
    // Who has it next finds out the same.
    giveBack(connection, 0, 0);
    return true;
  }
  for (let at = 0; at < end; at += NBD_REQUEST_LENGTH) {
    const outcome = isRequest(at, end) ? answer(connection, at) : 'left';
    if (outcome === 'answered') continue;
    if (outcome === 'broken') shutDown(socket);
    giveBack(connection, at, outcome === 'broken' ? at : end);
    break;
  }
  return true;
}

/** @returns false: the end */
function obey(order: DirectOrder): boolean {
  if (order === 'end') return false;
  clockOffset = order.now - performance.now();
  lookAtClock();
  // Without a limit a wait for one socket could not be left for the others.
  if (setReceiveTimeout(order.socket, ALONE_WAIT)) setNonBlocking(order.socket, false);
  connections.push(order);
  return true;
}

/** @returns false: the end */
function obeyAll(): boolean {
  ordersSeen = Atomics.load(orders, 0);
  recv(wake, requests.address, received.length, MSG_DONTWAIT);
  for (let one = receiveMessageOnPort(port!); one !== undefined; one = receiveMessageOnPort(port!)) {
    if (!obey(one.message as DirectOrder)) return false;
  }
  return true;
}

/** Serves until there is nothing to be served. @returns false: the end */
function serveAll(): boolean {
  let isQuiet = false;
  while (connections.length > 0) {
    const [alone] = connections;
    if (alone !== undefined && connections.length === 1 && !isQuiet) {
      isQuiet = !serve(alone, 0);
      if (++turns % TURNS_PER_LOOK === 0) lookAtClock();
      if (Atomics.load(orders, 0) !== ordersSeen && !obeyAll()) return false;
      continue;
    }
    polledWords[0] = wake;
    polledWords[1] = POLLIN;
    for (let index = 0; index < connections.length; index++) {
      polledWords[2 * index + 2] = connections[index]?.socket ?? -1;
      polledWords[2 * index + 3] = POLLIN;
    }
    const asked = connections.length;
    const count = poll(polled.address, asked + 1, LONGEST_WAIT);
    if (count <= 0 || ++turns % TURNS_PER_LOOK === 0) lookAtClock();
    if (count <= 0) continue;
    isQuiet = false;
    // From the end: one that is given back moves those behind it.
    for (let index = asked - 1; index >= 0; index--) {
      const connection = connections[index];
      if (connection !== undefined && (polledWords[2 * index + 3] ?? 0) >>> 16 !== 0)
        serve(connection, MSG_DONTWAIT);
    }
    if ((polledWords[1] ?? 0) >>> 16 !== 0 && !obeyAll()) return false;
  }
  return true;
}

port.on('message', (order: DirectOrder) => {
  if (obey(order) && serveAll()) return;
  for (const connection of [...connections]) giveBack(connection, 0, 0);
  port.close();
});
port.postMessage('ready' satisfies DirectAnswer);
