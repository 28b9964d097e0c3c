/**
 * The time of day in nanoseconds.
 *
 * containerd compares the times of a snapshot with its own clock before and after the call, in nanoseconds. Date.now()
 * is cut to milliseconds and so lies before the call began; performance.now() is not corrected with the system's clock.
 */
import koffi from 'koffi';

const timespec = koffi.struct({ tv_sec: 'long', tv_nsec: 'long' });
const clockGettime = koffi
  .load('libc.so.6')
  .func('clock_gettime', 'int', ['int', koffi.out(koffi.pointer(timespec))]) as (
  clock: number,
  time: { tv_sec: number; tv_nsec: number },
) => number;

const CLOCK_REALTIME = 0;

/** Nanoseconds since 1970-01-01 UTC, as every other process of the machine sees them. */
export function realtimeNs(): bigint {
  const time = { tv_sec: 0, tv_nsec: 0 };
  if (clockGettime(CLOCK_REALTIME, time) !== 0) throw new Error('clock_gettime(CLOCK_REALTIME) failed');
  return BigInt(time.tv_sec) * 1_000_000_000n + BigInt(time.tv_nsec);
}
