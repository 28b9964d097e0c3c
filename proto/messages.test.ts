import { describe, expect, it } from 'vitest';
import { control, snapshots } from './messages.js';

describe('a 64-bit field', () => {
  it('is a number, absent or not', () => {
    const decode = (statistics: control.DeviceStatistics.$Properties) =>
      control.DeviceStatistics.decode(control.DeviceStatistics.encode(statistics).finish());
    expect(decode({}).fetchedBytes).toBe(0);
    expect(decode({ fetchedBytes: 2 ** 40 + 1 }).fetchedBytes).toBe(2 ** 40 + 1);
    expect(new snapshots.UsageResponse().size).toBe(0);
  });

  it('keeps negative seconds', () => {
    const bytes = snapshots.Info.encode({ createdAt: { seconds: -1, nanos: 5 } }).finish();
    expect(snapshots.Info.decode(bytes).createdAt).toEqual({ seconds: -1, nanos: 5 });
  });
});
