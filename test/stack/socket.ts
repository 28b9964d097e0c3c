/**
 * Is anybody there?
 */
import { connectivityState, Client, credentials } from '@grpc/grpc-js';

/** True when a gRPC server answers on the unix socket: its HTTP/2 greeting, not only the connection. */
export async function grpcAnswers(socket: string): Promise<boolean> {
  const client = new Client(`unix:${socket}`, credentials.createInsecure());
  try {
    return await new Promise<boolean>((resolve) => {
      client.waitForReady(Date.now() + 500, (error) =>
        resolve(
          error === undefined && client.getChannel().getConnectivityState(false) === connectivityState.READY,
        ),
      );
    });
  } finally {
    client.close();
  }
}
