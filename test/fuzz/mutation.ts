/** Damage to bytes, decided by a seed: what bits, tools and attackers do to them. */
import { random } from '../../blobserve/layer/gzip/sample-data.js';

/** Numbers from 0 to below `below`. */
export type Pick = (below: number) => number;

export function picker(seed: number): Pick {
  const next = random(seed);
  // The first numbers of neighbouring seeds are alike.
  for (let i = 0; i < 8; i++) next();
  return (below) => next() % Math.max(1, below);
}

/** Numbers at which lengths, counts and signs go wrong. */
const EDGES = [0, 1, 7, 8, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff];

/**
 * A damaged copy.
 *
 * @param sameLength only bytes change
 * @param from @param to where the damage may be; default: anywhere
 */
export function mutate(bytes: Buffer, pick: Pick, sameLength = false, from = 0, to = bytes.length): Buffer {
  let result = Buffer.from(bytes);
  for (let edits = 1 + pick(3); edits > 0; edits--) {
    const end = Math.min(to, result.length);
    if (end <= from) return result;
    const at = from + pick(end - from);
    const length = Math.min(1 + pick(pick(4) === 0 ? 600 : 8), end - at);
    switch (pick(sameLength ? 5 : 8)) {
      case 0:
        result.writeUInt8(result.readUInt8(at) ^ (1 << pick(8)), at);
        break;
      case 1:
        result.fill(pick(256), at, at + length);
        break;
      case 2: {
        const edge = EDGES[pick(EDGES.length)] ?? 0;
        if (at + 8 <= end && pick(3) === 0) result.writeBigUInt64LE(BigInt(edge) << BigInt(pick(33)), at);
        else if (at + 4 <= end) result.writeUInt32LE(edge, at);
        break;
      }
      case 3:
        for (let i = at; i < at + length; i++) result.writeUInt8(pick(256), i);
        break;
      case 4:
        result.copyWithin(at, from + pick(end - from), end - (at - from));
        break;
      case 5:
        result = result.subarray(0, at);
        break;
      case 6:
        result = Buffer.concat([result.subarray(0, at), result.subarray(at + length)]);
        break;
      case 7:
        result = Buffer.concat([
          result.subarray(0, at),
          result.subarray(at, at + length),
          result.subarray(at),
        ]);
        break;
    }
  }
  return result;
}

/** Cuts bytes at random places; into pieces of a few bytes only what is short, as each costs a call. */
export function split(bytes: Buffer, pick: Pick): Buffer[] {
  const pieces: Buffer[] = [];
  const most = [bytes.length < 30_000 ? 3 : 300, 700, 5000, bytes.length][pick(4)] ?? 700;
  for (let at = 0; at < bytes.length;) {
    const length = 1 + pick(most);
    pieces.push(bytes.subarray(at, at + length));
    at += length;
  }
  return pieces;
}
