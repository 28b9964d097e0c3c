import { describe, expect, it } from 'vitest';
import { ReadError } from './blob-reader.js';
import { ConcatReader } from './concat.js';
import { ScriptedReader, truth } from './testing/scripted-reader.js';

/** Readers of the given sizes end to end, and the bytes they are. */
function stack(sizes: number[], answer?: 'at once') {
  const parts = sizes.map((size) => new ScriptedReader(size, answer));
  const whole = Buffer.concat(sizes.map((size) => truth(0, size)));
  return { parts, whole, reader: new ConcatReader('layer x', parts) };
}

describe('readers end to end', () => {
  it.each([[[7]], [[3, 4]], [[0, 5]], [[5, 0]], [[2, 0, 0, 3]], [[1, 1, 1, 1]], [[0, 0]]])(
    'read as one, at every offset and length (%j)',
    async (sizes) => {
      const { whole, reader } = stack(sizes, 'at once');
      expect(reader.size).toBe(whole.length);
      for (let offset = 0; offset <= whole.length; offset++) {
        for (let length = 0; offset + length <= whole.length; length++) {
          const target = Buffer.alloc(length, 0xdd);
          await reader.read(target, offset);
          expect(target.equals(whole.subarray(offset, offset + length))).toBe(true);
        }
      }
      await expect(reader.read(Buffer.alloc(1), whole.length)).rejects.toThrow(RangeError);
    },
  );

  it('ask each part only for what is its own', async () => {
    const { parts, reader } = stack([10, 10, 10], 'at once');
    await reader.read(Buffer.alloc(12), 9);
    await reader.read(Buffer.alloc(5), 10);
    expect(parts.map(({ asked }) => asked)).toEqual([
      [[9, 1]],
      [
        [0, 10],
        [0, 5],
      ],
      [[0, 1]],
    ]);
  });

  it('report progress in the order of the bytes, and end when every part has', async () => {
    const { parts, reader } = stack([10, 10]);
    const progress: number[] = [];
    let settled = false;
    const read = reader
      .read(Buffer.alloc(20), 0, (filled) => progress.push(filled))
      .finally(() => (settled = true));
    const [first, second] = await Promise.all(parts.map((part) => part.request(0)));
    second?.finish();
    await new Promise(setImmediate);
    expect(progress).toEqual([]);
    first?.deliver(4);
    first?.finish();
    await read;
    expect(progress).toEqual([4, 10, 20]);
    expect(settled).toBe(true);
  });

  it('fail with the first failure, when no part touches the target any more', async () => {
    const { parts, reader } = stack([10, 10]);
    const error = new ReadError('missing', 'gone');
    let settled = false;
    const read = reader.read(Buffer.alloc(20), 0).finally(() => (settled = true));
    const result = Promise.allSettled([read]);
    (await parts[0]?.request(0))?.fail(error);
    await new Promise(setImmediate);
    expect(settled).toBe(false);
    (await parts[1]?.request(0))?.finish();
    expect(await result).toEqual([{ status: 'rejected', reason: error }]);
  });

  it('read without waiting only when every part can', () => {
    const { parts, reader } = stack([10, 10]);
    const target = Buffer.alloc(6);
    const now = (own: number) => (into: Buffer) => {
      into.fill(own);
      return true;
    };
    Object.assign(parts[0] ?? {}, { readNow: now(1) });
    expect(reader.readNow(target, 7)).toBe(false);
    expect(reader.readNow(target, 4)).toBe(true);
    Object.assign(parts[1] ?? {}, { readNow: now(2) });
    expect(reader.readNow(target, 7)).toBe(true);
    expect([...target]).toEqual([1, 1, 1, 2, 2, 2]);
    expect(reader.readNow(target, 15)).toBe(false);
    expect(reader.readNow(target, -1)).toBe(false);
  });

  it('pass hints on to the parts they are about, clipped', () => {
    const { parts, reader } = stack([10, 10, 10]);
    reader.willNeed(5, 10);
    reader.willNeed(25, 1000);
    expect(parts.map(({ hints }) => hints)).toEqual([[[5, 5]], [[0, 5]], [[5, 5]]]);
  });

  it('close every part, also when one cannot', async () => {
    const { parts, reader } = stack([1, 1, 1]);
    Object.assign(parts[0] ?? {}, { close: () => Promise.reject(new Error('no')) });
    await expect(reader.close()).rejects.toThrow('no');
    expect(parts.map(({ closed }) => closed)).toEqual([false, true, true]);
    await expect(reader.read(Buffer.alloc(1), 0)).rejects.toMatchObject({ kind: 'closed' });
    expect(reader.readNow(Buffer.alloc(1), 0)).toBe(false);
  });
});
