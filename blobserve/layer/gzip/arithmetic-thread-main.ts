/** The arithmetic thread: takes slots from the ring until it is told to quit. Started by arithmetic-thread.ts. */
import { parentPort, workerData } from 'node:worker_threads';
import { nativeSha256, openSha256, type Sha256, SHA256_STATE_SIZE } from '../../linux/sha256.js';
import { nativeZlib } from '../../linux/zlib.js';
import { ArithmeticRing, CRC_SIZE, END, PACK, QUIT, RESUME, SAVE, WINDOW_HEADER } from './arithmetic-ring.js';
import { packWindow } from './packed-window.js';

if (!(workerData instanceof SharedArrayBuffer)) throw new Error('the arithmetic thread needs its ring');
const ring = new ArithmeticRing(workerData);
const streams = new Map<number, Sha256>();
// Before it says anything: see end-thread.ts.
nativeSha256();
nativeZlib();
parentPort?.postMessage('ready');

function hash(stream: number, length: number, slot: Buffer): void {
  if (length === RESUME) {
    streams.set(stream, openSha256(Buffer.from(slot.subarray(0, SHA256_STATE_SIZE))));
    return;
  }
  const sha256 = streams.get(stream) ?? openSha256();
  streams.set(stream, sha256);
  if (length === END) {
    sha256.digest().copy(slot);
    streams.delete(stream);
  } else if (length === SAVE) sha256.save?.().copy(slot);
  else sha256.update(slot.subarray(0, length));
}

function pack(count: number, length: number, slot: Buffer): void {
  const { size, ...at } = WINDOW_HEADER;
  const windowEnd = size + slot.readUInt32LE(at.length);
  const head = {
    bits: slot.readUInt8(at.bits),
    lastByte: slot.readUInt8(at.lastByte),
    bytes: slot.subarray(windowEnd, length),
  };
  const { stored, storedCrc } = packWindow(slot.subarray(size, windowEnd), head);
  slot.writeUInt32LE(storedCrc, 0);
  stored.copy(slot, CRC_SIZE);
  ring.describe(count, PACK, stored.length);
}

for (let count = 0; ;) {
  if (Atomics.load(ring.control, ArithmeticRing.WRITTEN) === count) {
    Atomics.wait(ring.control, ArithmeticRing.WRITTEN, count);
    continue;
  }
  const { stream, length } = ring.description(count);
  if (stream === QUIT) break;
  const slot = ring.slot(count);
  if (stream === PACK) pack(count, length, slot);
  else hash(stream, length, slot);
  count = (count + 1) | 0;
  Atomics.store(ring.control, ArithmeticRing.DONE, count);
  Atomics.notify(ring.control, ArithmeticRing.DONE);
}
