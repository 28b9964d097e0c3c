/**
 * Where something listens that is for this machine alone: "127.0.0.1:9153", "[::1]:9153", "localhost:9153", or
 * "unix:/run/…/metrics.sock".
 */
import path from 'node:path';

export type ListenAddress =
  { readonly socket: string } | { readonly host: '127.0.0.1' | '::1' | 'localhost'; readonly port: number };

/** Paths of unix sockets end up in a 108-byte field of the kernel (sun_path), one byte of it a NUL. */
export const SOCKET_PATH_MAX = 107;

const EXPECTED =
  'expected "127.0.0.1:PORT", "[::1]:PORT", "localhost:PORT" or "unix:/absolute/path": it is for this machine alone';

/**
 * @param text port 0 lets the kernel choose one
 * @throws {RangeError} saying what was expected
 */
export function parseListenAddress(text: string): ListenAddress {
  if (text.startsWith('unix:')) {
    const socket = text.slice('unix:'.length);
    if (!path.isAbsolute(socket) || socket.includes('\0')) throw new RangeError(EXPECTED);
    if (Buffer.byteLength(socket) > SOCKET_PATH_MAX) {
      throw new RangeError(
        `expected a path of at most ${SOCKET_PATH_MAX} bytes, the kernel's limit for a socket`,
      );
    }
    return { socket };
  }
  const match = /^(127\.0\.0\.1|\[::1\]|localhost):(\d{1,5})$/.exec(text);
  const port = Number(match?.[2] ?? NaN);
  if (match === null || !(port <= 65_535)) throw new RangeError(EXPECTED);
  const host = match[1] === '127.0.0.1' ? '127.0.0.1' : match[1] === 'localhost' ? 'localhost' : '::1';
  return { host, port };
}
