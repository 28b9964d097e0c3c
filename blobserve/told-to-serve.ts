/**
 * When a process that has been started may begin: a line from the snapshotter says so, on its standard input.
 */
import { Socket } from 'node:net';

/**
 * Waits for the line. It means that this process is written down as the one that serves. Its end without one means that the
 * snapshotter has died or wants another: nobody knows of this process then, and two may never serve one connection.
 *
 * @returns whether this process is to serve
 */
export function toldToServe(): Promise<boolean> {
  const line = new Socket({ fd: 0, readable: true, writable: false });
  return new Promise<boolean>((resolve) => {
    line.once('data', () => resolve(true));
    line.once('end', () => resolve(false));
    line.once('error', () => resolve(false));
  }).finally(() => line.destroy());
}
