/**
 * The daemon's unix socket: taken over when its last owner is dead, refused when somebody answers.
 */
import { chmod, lstat, mkdir, rm } from 'node:fs/promises';
import net from 'node:net';
import path from 'node:path';
import * as grpc from '@grpc/grpc-js';

/** The daemon cannot have its socket, and the message says what to do. */
export class SocketError extends Error {
  override readonly name = 'SocketError';
}

function answers(socket: string): Promise<boolean> {
  return new Promise((resolve) => {
    const connection = net.connect(socket);
    connection.setTimeout(2000);
    connection.once('connect', () => (connection.destroy(), resolve(true)));
    // A full backlog or a stopped process accepts nothing in time, but somebody owns the socket.
    connection.once('timeout', () => (connection.destroy(), resolve(true)));
    connection.once('error', () => resolve(false));
  });
}

/**
 * Starts serving on a unix socket that only root may use.
 *
 * @throws {SocketError} another process answers there, or something else than a socket is there
 * @throws {Error} the directory cannot be written
 */
export async function listen(server: grpc.Server, socket: string): Promise<void> {
  await mkdir(path.dirname(socket), { recursive: true, mode: 0o711 });
  if (await answers(socket)) {
    throw new SocketError(
      `${socket}: another process answers on this socket; stop it, or choose another with --address`,
    );
  }
  const found = await lstat(socket).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined;
    throw error;
  });
  if (found?.isSocket() === false) {
    throw new SocketError(
      `${socket} is no socket and is left alone; move it away, or choose another --address`,
    );
  }
  await rm(socket, { force: true });
  await new Promise<void>((resolve, reject) => {
    server.bindAsync(`unix:${socket}`, grpc.ServerCredentials.createInsecure(), (error) =>
      error === null ? resolve() : reject(new Error(`${socket}: ${error.message}`)),
    );
  });
  await chmod(socket, 0o600);
}
