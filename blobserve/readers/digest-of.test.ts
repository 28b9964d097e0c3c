import { createHash } from 'node:crypto';
import { expect, it } from 'vitest';
import { MemoryBlob } from '../../test/memory-blob.js';
import { mixture } from '../layer/gzip/sample-data.js';
import { ReadError } from './blob-reader.js';
import { digestOf } from './digest-of.js';

it.each([0, 1, 1024 * 1024, 3_500_000])(
  'is the SHA-256 of all that a reader gives, of %i bytes',
  async (size) => {
    const bytes = mixture(size, 5);
    const expected = `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
    expect(await digestOf(new MemoryBlob(bytes))).toBe(expected);
  },
);

it('passes on what the reader fails with', async () => {
  const error = new ReadError('corrupt', 'a span has another digest');
  const blob = new MemoryBlob(mixture(3_000_000, 6), (offset) => {
    if (offset > 1_000_000) throw error;
  });
  await expect(digestOf(blob)).rejects.toBe(error);
});
