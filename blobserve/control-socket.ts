/**
 * The socket that the control API answers on: under a name of this process's own until it is to serve, so that a process which
 * stands by can be loaded, bound and tried while another one serves.
 */
import { rmSync } from 'node:fs';
import { chmod, rename } from 'node:fs/promises';
import process from 'node:process';
import * as grpc from '@grpc/grpc-js';
import { standbySocket } from '../daemon/layout.js';

export class ControlSocket {
  #path: string;

  private constructor(private readonly published: string) {
    this.#path = standbySocket(published, process.pid);
  }

  /**
   * Binds a server with all of its services.
   *
   * @param path where whoever looks for the data plane will find it, once it is published
   * @throws {Error} of the bind that failed
   */
  static async bind(server: grpc.Server, path: string): Promise<ControlSocket> {
    const socket = new ControlSocket(path);
    socket.remove();
    await new Promise<void>((resolve, reject) => {
      server.bindAsync(`unix:${socket.#path}`, grpc.ServerCredentials.createInsecure(), (error) =>
        error === null ? resolve() : reject(error),
      );
    });
    // It tells credentials.
    await chmod(socket.#path, 0o600);
    return socket;
  }

  /** From here on it is this process that is found. */
  async publish(): Promise<void> {
    await rename(this.#path, this.published);
    this.#path = this.published;
  }

  remove(): void {
    rmSync(this.#path, { force: true });
  }
}
