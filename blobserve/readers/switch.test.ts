/** Reads go to one of the two as a whole, and nobody notices when that changes. */
import { beforeEach, describe, expect, it } from 'vitest';
import { ReadError } from './blob-reader.js';
import { SwitchReader } from './switch.js';
import { ScriptedReader, truth } from './testing/scripted-reader.js';

const SIZE = 100_000;

let first: ScriptedReader;
let file: ScriptedReader;
let reader: SwitchReader;
let failures: unknown[];
beforeEach(() => {
  first = new ScriptedReader(SIZE, 'at once');
  file = new ScriptedReader(SIZE, 'at once');
  failures = [];
  reader = new SwitchReader('layer', first);
});
const use = (other = file): void => reader.switchTo(other, (error) => failures.push(error));

async function expectRight(offset: number, length: number): Promise<void> {
  const target = Buffer.alloc(length);
  await reader.read(target, offset);
  expect(target.equals(truth(offset, length))).toBe(true);
}

describe('a device that may be had as a file', () => {
  it('is read from the file from when there is one until it is left', async () => {
    await expectRight(0, 1000);
    expect(reader.lastReadMs).toBe(0);
    use();
    expect(reader.switched).toBe(true);
    await expectRight(1000, 1000);
    reader.willNeed(2000, 1000);
    await reader.switchBack();
    expect(file.closed).toBe(true);
    await expectRight(2000, 1000);
    reader.willNeed(3000, 1000);
    expect(first.asked).toEqual([
      [0, 1000],
      [2000, 1000],
    ]);
    expect(file.asked).toEqual([[1000, 1000]]);
    expect([first.hints, file.hints]).toEqual([[[3000, 1000]], []]);
    expect(reader.lastReadMs).toBeGreaterThan(0);
  });

  it('leaves the file only when reads of it have ended, and sends none there meanwhile', async () => {
    file.answer = undefined;
    use();
    const reading = expectRight(10, 20);
    const request = await file.request(0);
    let left = false;
    const leaving = reader.switchBack().then(() => (left = true));
    await expectRight(50, 60);
    expect([left, file.closed]).toEqual([false, false]);
    request.finish();
    await reading;
    await leaving;
    expect(file.closed).toBe(true);
    expect(first.asked).toEqual([[50, 60]]);
  });

  it('goes on as before when the file cannot be read, and says so once', async () => {
    file.answer = undefined;
    use();
    const reads = [expectRight(0, 10), expectRight(20, 10)];
    const trouble = new ReadError('local', 'the disk is broken');
    (await file.request(0)).fail(trouble);
    (await file.request(1)).fail(trouble);
    await Promise.all(reads);
    await expectRight(40, 10);
    expect(failures).toEqual([trouble]);
    await expect.poll(() => file.closed).toBe(true);
    expect(file.asked).toHaveLength(2);
  });

  it('does not take what has another size', () => {
    expect(() => use(new ScriptedReader(SIZE - 512))).toThrow(RangeError);
    expect(reader.switched).toBe(false);
  });

  it('refuses ranges outside of it whichever it reads', async () => {
    use();
    await expect(reader.read(Buffer.alloc(10), SIZE - 5)).rejects.toThrow(RangeError);
    expect(failures).toEqual([]);
  });

  it('closes both, and takes no file afterwards', async () => {
    use();
    await reader.close();
    expect([first.closed, file.closed]).toEqual([true, true]);
    expect(() => use(new ScriptedReader(SIZE))).toThrow(/closed/);
  });
});
