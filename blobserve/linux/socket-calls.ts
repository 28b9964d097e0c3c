/**
 * recv(2) and send(2) as they are: for who has one socket and does nothing else, and for questions of one byte. They wait
 * unless a flag or the open file says not to.
 */
import { libc } from './libc.js';

/** Bytes for a system call: memory, or the address of some that does not move. */
export type Memory = Uint8Array | bigint;

// <bits/socket.h>
export const MSG_PEEK = 0x02;
export const MSG_DONTWAIT = 0x40;
export const MSG_NOSIGNAL = 0x4000;

/** @returns how many bytes came, 0 at the end, or -1 with `koffi.errno()` */
export const recv = libc.func('long recv(int descriptor, void *bytes, size_t length, int flags)') as (
  descriptor: number,
  bytes: Memory,
  length: number,
  flags: number,
) => number;

/** @returns how many bytes were taken, or -1 with `koffi.errno()` */
export const send = libc.func('long send(int descriptor, const void *bytes, size_t length, int flags)') as (
  descriptor: number,
  bytes: Memory,
  length: number,
  flags: number,
) => number;
