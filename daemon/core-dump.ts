/**
 * Passwords and tokens are in the memory of processes that use them, and are not to get into core dumps.
 */
import { writeFileSync } from 'node:fs';
import type { Logger } from './log.js';

/** Leaves this process's memory, and that of its children, out of core dumps. (core(5): no kind of mapping is written.) */
export function keepMemoryOutOfCoreDumps(log: Logger): void {
  try {
    writeFileSync('/proc/self/coredump_filter', '0');
  } catch (error) {
    log.warn({ err: error }, 'a core dump of this process would hold passwords and tokens');
  }
}
