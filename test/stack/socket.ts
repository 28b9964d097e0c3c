/**
 * Is anybody there?
 */
import { connect } from 'node:net';
import { connectivityState, Client, credentials } from '@grpc/grpc-js';
import { patience } from '../patience.js';

/** True when a gRPC server answers on the unix socket: its HTTP/2 greeting, not only the connection. */
export async function grpcAnswers(socket: string): Promise<boolean> {
  // A client costs milliseconds of a processor that whoever is awaited needs as well.
  if (!(await accepts(socket))) return false;
  const client = new Client(`unix:${socket}`, credentials.createInsecure());
  try {
    return await new Promise<boolean>((resolve) => {
      client.waitForReady(Date.now() + patience(500), (error) =>
        resolve(
          error === undefined && client.getChannel().getConnectivityState(false) === connectivityState.READY,
        ),
      );
    });
  } finally {
    client.close();
  }
}

/** True when somebody listens there. */
function accepts(socket: string): Promise<boolean> {
  return new Promise((resolve) => {
    const connection = connect(socket);
    connection.once('connect', () => {
      connection.destroy();
      resolve(true);
    });
    // No such file, or nobody behind it.
    connection.once('error', () => resolve(false));
  });
}
