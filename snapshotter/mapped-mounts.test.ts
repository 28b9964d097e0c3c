import { describe, expect, it } from 'vitest';
import { mapsMounts } from './mapped-mounts.js';

describe('ids of layers that are mounts of their own', () => {
  it.each(['2.3.0', 'v2.3.0-rc.1', '2.3.1~ds1-1', '2.10.0', '3.0.0', '2.3'])('are mapped by %s', (version) =>
    expect(mapsMounts(version)).toBe(true),
  );

  it.each(['1.6.20~ds1', '1.7.24', '2.1.9+ds1', 'v2.2.7', '', 'unknown', '2', '2.3x.'.slice(0, 2)])(
    'are not known to be by %j',
    (version) => expect(mapsMounts(version)).toBe(false),
  );
});
