import { mkdtempSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import * as grpc from '@grpc/grpc-js';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { listen, SocketError } from './socket.js';

let directory: string;
let socket: string;
const servers: grpc.Server[] = [];
beforeEach(() => {
  directory = mkdtempSync(path.join(tmpdir(), 'erofs-nbd-socket-'));
  socket = path.join(directory, 'below', 'it.sock');
});
afterEach(() => {
  for (const server of servers.splice(0)) server.forceShutdown();
  rmSync(directory, { recursive: true, force: true });
});

function newServer(): grpc.Server {
  const server = new grpc.Server();
  servers.push(server);
  return server;
}

const connects = (): Promise<boolean> =>
  new Promise((resolve) => {
    const connection = net.connect(socket);
    connection.once('connect', () => (connection.destroy(), resolve(true)));
    connection.once('error', () => resolve(false));
  });

describe('the socket', () => {
  it('is for root alone', async () => {
    await listen(newServer(), socket);
    expect(statSync(socket).mode & 0o777).toBe(0o600);
    expect(await connects()).toBe(true);
  });

  it('is refused while somebody answers on it, who goes on answering', async () => {
    await listen(newServer(), socket);
    const second = listen(newServer(), socket);
    await expect(second).rejects.toThrow(SocketError);
    await expect(second).rejects.toThrow(`${socket}: another process answers on this socket`);
    expect(await connects()).toBe(true);
  });

  it('is taken over from one who is dead', async () => {
    const dead = net.createServer();
    const bound = path.join(directory, 'bound');
    await new Promise<void>((resolve) => dead.listen(bound, resolve));
    await listen(newServer(), socket);
    // What a process leaves that is killed: a socket nobody listens on.
    renameSync(bound, socket);
    await new Promise((resolve) => dead.close(resolve));
    expect(await connects()).toBe(false);
    await listen(newServer(), socket);
    expect(await connects()).toBe(true);
  });

  it('does not replace a file that is none', async () => {
    socket = path.join(directory, 'file');
    writeFileSync(socket, 'precious');
    await expect(listen(newServer(), socket)).rejects.toThrow('is no socket and is left alone');
    expect(readFileSync(socket, 'utf8')).toBe('precious');
  });
});
