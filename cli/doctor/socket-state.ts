/** Whether somebody answers on a unix socket. */
import net from 'node:net';

export type SocketState = 'answers' | 'does not exist' | 'nobody answers' | 'permission denied';

/** Milliseconds; whoever accepts a connection does so at once. */
const TIMEOUT = 3000;

export function socketState(socket: string): Promise<SocketState> {
  return new Promise((resolve) => {
    const connection = net.connect(socket);
    const done = (state: SocketState): void => {
      connection.destroy();
      resolve(state);
    };
    connection.setTimeout(TIMEOUT, () => done('nobody answers'));
    connection.once('connect', () => done('answers'));
    connection.once('error', ({ code }: NodeJS.ErrnoException) => {
      if (code === 'ENOENT') done('does not exist');
      else done(code === 'EACCES' || code === 'EPERM' ? 'permission denied' : 'nobody answers');
    });
  });
}
