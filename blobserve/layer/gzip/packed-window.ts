/** The window of a checkpoint as it is stored (zwin.ts): deflated on its own. */
import { crc32 } from 'node:zlib';
import { deflateSync } from 'fflate';
import { type SpanHead, sparseWindow } from './sparse-window.js';

/** A window as it is stored. */
export interface PackedWindow {
  readonly stored: Buffer;
  readonly storedCrc: number;
  readonly windowSize: number;
}

/**
 * Deflates a window, in about a millisecond; the result does not refer to it. By fflate, not Node's zlib: the same window
 * gives the same bytes whatever zlib a Node is built with, so the same layer gives the same file.
 *
 * @param head of its span: what that does not refer to is left out. Without it, all of the window is kept
 */
export function packWindow(window: Buffer, head?: SpanHead): PackedWindow {
  const kept = head === undefined || window.length === 0 ? window : sparseWindow(window, head);
  const stored = window.length === 0 ? Buffer.alloc(0) : Buffer.from(deflateSync(kept, { level: 4 }));
  return { stored, storedCrc: crc32(stored), windowSize: window.length };
}
