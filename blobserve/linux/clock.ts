/** The machine's clock to the nanosecond; Date has milliseconds only. */
import { libc, systemCallError } from './libc.js';

const clockGettime = libc.func('int clock_gettime(int clock, void *time)');
const CLOCK_REALTIME = 0;
const time = new BigInt64Array(2);

/** Nanoseconds since 1970. */
export function realTimeNs(): bigint {
  if (clockGettime(CLOCK_REALTIME, time) !== 0) throw systemCallError('clock_gettime', 'CLOCK_REALTIME');
  return (time[0] ?? 0n) * 1_000_000_000n + (time[1] ?? 0n);
}
