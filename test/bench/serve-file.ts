/**
 * A process that serves a file with our NBD server on a unix socket, for benchmark clients.
 *
 *     node serve-file.js SOCKET FILE
 */
import { statSync } from 'node:fs';
import { type Socket, createServer } from 'node:net';
import { NbdServer } from '../../blobserve/attach/nbd-server.js';
import { ReplyMemory } from '../../blobserve/attach/reply-memory.js';
import { libc } from '../../blobserve/linux/libc.js';
import { FileReader } from '../../blobserve/readers/file.js';
import { shakeHands } from './nbd-handshake.js';

const dup = libc.func('int dup(int descriptor)') as (descriptor: number) => number;

/** Node does not tell the descriptor of a connection it has accepted; its handle does. */
function descriptorOf(socket: Socket): number {
  const { _handle: handle } = socket as unknown as { _handle: { fd: number } };
  return handle.fd;
}

const [, , path = '', file = ''] = process.argv;
const reader = await FileReader.open({ path: file, size: statSync(file).size });
const memory = new ReplyMemory(64 * 1024 * 1024);

createServer((socket) => {
  shakeHands(socket, reader.size).then(
    () => {
      // From here on the product's own server has the connection, on a descriptor like the one it has of a socket pair.
      const server = new NbdServer(dup(descriptorOf(socket)), reader, { memory });
      socket.destroy();
      void server.ended.then((end) => {
        if (end.reason === 'failed') {
          console.error(end.error);
        }
      });
    },
    (error: unknown) => console.error(error),
  );
}).listen(path, () => console.log('listening'));
