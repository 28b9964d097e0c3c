/** stargz-snapshotter's daemon with its defaults. */
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { stargzGrpcProgram } from '../debian/stargz-grpc.js';
import type { ProxyPlugin } from './containerd.js';
import { startDaemon, type Daemon } from './daemon-process.js';
import { grpcAnswers } from './socket.js';

export interface StargzSnapshotter extends Daemon {
  readonly plugin: ProxyPlugin;
}

/** @param directory the stack's private directory */
export async function startStargzSnapshotter(directory: string): Promise<StargzSnapshotter> {
  const [root, address] = [path.join(directory, 'stargz'), path.join(directory, 'stargz.sock')];
  await mkdir(root, { recursive: true });
  const daemon = await startDaemon({
    name: 'containerd-stargz-grpc',
    command: await stargzGrpcProgram(),
    parameters: ['--address', address, '--root', root],
    log: path.join(directory, 'stargz-snapshotter.log'),
    ready: () => grpcAnswers(address),
  });
  return { ...daemon, plugin: { name: 'stargz', address, root } };
}
