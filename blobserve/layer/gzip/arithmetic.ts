/**
 * The part of an indexing's arithmetic that need not be where the blob is inflated: SHA-256 of blob and tar, and deflating
 * the windows of checkpoints. A thread of its own does it (arithmetic-thread.ts), or who asks for it.
 */
import { openSha256, type Sha256 } from '../../linux/sha256.js';
import { type PackedWindow, packWindow } from './packed-window.js';
import type { SpanHead } from './sparse-window.js';

export interface Arithmetic {
  /**
   * A new SHA-256, or one that goes on from a saved state.
   *
   * @throws {RangeError} when no state can be gone on with here, or it is none
   */
  sha256(state?: Buffer): Sha256;

  /** Begins to pack a window, of which the span behind it needs what its head tells; both are the caller's again at once. */
  packWindow(window: Buffer, head: SpanHead): WindowBeingPacked;
}

export interface WindowBeingPacked {
  /** Whether `take` has nothing to wait for. */
  readonly ready: boolean;
  /** The window, waited for on the calling thread. */
  take(): PackedWindow;
}

/** Done where it is asked for. */
export const inlineArithmetic: Arithmetic = {
  sha256: openSha256,
  packWindow: (window, head) => {
    const packed = packWindow(window, head);
    return { ready: true, take: () => packed };
  },
};
