/** What direct-serving.ts and its thread, direct-thread.ts, say to each other. */
import type { DirectFile } from '../readers/blob-reader.js';

/** That the thread has at a time. */
export const DIRECT_CONNECTIONS_MAX = 511;

export interface DirectThreadData {
  /** Becomes readable when there is a message. */
  readonly wake: number;
  /** In shared memory: how many messages there were. */
  readonly orders: Int32Array;
}

/** To the thread. Descriptors become the thread's. */
export type DirectOrder =
  | {
      readonly id: number;
      readonly socket: number;
      readonly file: Omit<DirectFile, 'served'>;
      /** Reads and bytes of them that were answered. */
      readonly counts: Float64Array;
      /** On the sender's clock of `performance.now`. */
      readonly now: number;
    }
  | 'end';

/** From the thread. */
export type DirectAnswer =
  | 'ready'
  | {
      readonly id: number;
      /** What was received and not answered; whole requests, the last perhaps cut off. */
      readonly rest: Uint8Array;
    };
