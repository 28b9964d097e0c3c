import { createHash } from 'node:crypto';
import { expect, it } from 'vitest';
import { nativeSha256, openSha256, SHA256_STATE_SIZE } from './sha256.js';

const bytes = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * i * 31) >> 7));
const digestOf = (part: Buffer): string => createHash('sha256').update(part).digest('hex');

it('is usable on this machine', () => {
  expect(nativeSha256()).toMatchObject({ available: true });
});

it('goes on from a state saved at any place, and leaves the one it was saved from as it was', () => {
  for (const place of [0, 1, 55, 56, 63, 64, 65, 127, 128, 250_001, bytes.length]) {
    const first = openSha256();
    first.update(bytes.subarray(0, place));
    const state = first.save?.() ?? Buffer.alloc(0);
    expect(state).toHaveLength(SHA256_STATE_SIZE);
    const second = openSha256(state);
    second.update(bytes.subarray(place));
    expect(second.digest().toString('hex')).toBe(digestOf(bytes));
    expect(first.digest().toString('hex')).toBe(digestOf(bytes.subarray(0, place)));
  }
});

it('hashes off the event loop too, which runs meanwhile, and nothing else meanwhile', async () => {
  const large = Buffer.alloc(64 * 1024 * 1024, bytes);
  const hash = openSha256();
  hash.update(bytes);
  const hashing = hash.updateAsync?.(large);
  let turns = 0;
  const counting = setInterval(() => turns++, 0);
  expect(() => hash.update(bytes)).toThrow(/at work/);
  expect(() => hash.save?.()).toThrow(/at work/);
  expect(() => hash.digest()).toThrow(/at work/);
  await hashing;
  clearInterval(counting);
  expect(turns).toBeGreaterThan(0);
  await hash.updateAsync?.(Buffer.alloc(0));
  hash.update(bytes);
  expect(hash.digest().toString('hex')).toBe(digestOf(Buffer.concat([bytes, large, bytes])));
});

it('refuses what is no state, before OpenSSL would write where its numbers say', () => {
  const state = openSha256().save?.() ?? Buffer.alloc(0);
  for (const [at, value] of [
    [104, 64],
    [104, 0xffffffff],
    [108, 64],
    [108, 0],
  ] as const) {
    const wrong = Buffer.from(state);
    wrong.writeUInt32LE(value, at);
    expect(() => openSha256(wrong)).toThrow(RangeError);
  }
  expect(() => openSha256(state.subarray(1))).toThrow(/111 bytes/);
});
