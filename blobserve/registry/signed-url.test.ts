import { describe, expect, it } from 'vitest';
import { usableUntil } from './signed-url.js';

const NOW = Date.UTC(2026, 0, 31, 12, 0, 0);
const left = (query: string) =>
  (usableUntil(new URL(`https://storage.example/blob${query}`), NOW) - NOW) / 1000;
const epoch = (seconds: number) => NOW / 1000 + seconds;

describe('usableUntil', () => {
  it.each<[string, string, number]>([
    ['S3', '?X-Amz-Date=20260131T115900Z&X-Amz-Expires=1200&X-Amz-Signature=x', 1140 - 10],
    ['Google', '?X-Goog-Date=20260131T120000Z&X-Goog-Expires=50', 45],
    ['Azure', '?se=2026-01-31T12%3A10%3A00Z&sig=x', 590],
    ['CloudFront', `?Expires=${epoch(300)}&Signature=x`, 290],
    [
      'CloudFront with a policy',
      `?Policy=${Buffer.from(
        JSON.stringify({ Statement: [{ Condition: { DateLessThan: { 'AWS:EpochTime': epoch(100) } } }] }),
      )
        .toString('base64')
        .replaceAll('+', '-')
        .replaceAll('=', '_')
        .replaceAll('/', '~')}`,
      90,
    ],
    ['one that is over', '?X-Amz-Date=20260131T110000Z&X-Amz-Expires=60', 0],
    ['one that lasts for years', `?Expires=${epoch(1e8)}`, 86_390],
    ['a query we cannot read', '?token=x', 60],
    ['nonsense', '?X-Amz-Date=soon&X-Amz-Expires=-1&se=never&Expires=x&Policy=%00', 60],
    ['none', '', 600],
  ])('of an address signed by %s', (_name, query, seconds) => {
    expect(left(query)).toBeCloseTo(seconds, 3);
  });
});
