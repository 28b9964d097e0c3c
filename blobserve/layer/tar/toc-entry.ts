/**
 * What the tables of contents of eStargz and of SOCI call the entries of a tar, and how long a path may be.
 *
 * Source: stargz-snapshotter, estargz/types.go (TOCEntry.Type); soci-snapshotter has taken the names over.
 */
import type { EntryType } from './entry.js';

export const TOC_ENTRY_TYPES: Readonly<Record<string, EntryType>> = {
  reg: 'file',
  dir: 'directory',
  hardlink: 'hardlink',
  symlink: 'symlink',
  char: 'char',
  block: 'block',
  fifo: 'fifo',
};

/** Bytes of a path: Linux's limit. */
export const PATH_MAX = 4096;
