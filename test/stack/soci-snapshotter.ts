/**
 * SOCI's snapshotter as its users start it. It knows one place for what it keeps of indexes, so that it has to be the only one
 * of its mount namespace; see {@link inMountNamespace}.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { sociSnapshotterProgram } from '../debian/packages.js';
import type { ProxyPlugin } from './containerd.js';
import { startDaemon, type Daemon } from './daemon-process.js';
import { absentDirectories, removeEmpty } from './shared-directories.js';
import { grpcAnswers } from './socket.js';

/** Also where `soci` looks for its files. */
const ROOT = '/var/lib/soci-snapshotter-grpc';

export interface SociSnapshotter extends Daemon {
  readonly plugin: ProxyPlugin;
}

/**
 * With its defaults, its files in a directory of the stack's. It fetches layers from loopback in plain HTTP, but indexes by
 * TLS from wherever they are (0.4.1).
 *
 * @param directory the stack's private directory
 * @param ca PEM of who has signed the registry's certificate
 */
export async function startSociSnapshotter(directory: string, ca: string): Promise<SociSnapshotter> {
  const [root, address] = [path.join(directory, 'soci-snapshotter'), path.join(directory, 'soci.sock')];
  await mkdir(root, { recursive: true });
  const trusted = path.join(directory, 'soci-ca.pem');
  await writeFile(trusted, ca);
  const absent = await absentDirectories([ROOT]);
  await mkdir(ROOT, { recursive: true });
  await execa('mount', ['--bind', root, ROOT]);
  const release = async (): Promise<void> => {
    await execa('umount', ['--recursive', '--lazy', ROOT], { reject: false });
    await removeEmpty(absent);
  };
  try {
    const daemon = await startDaemon({
      name: 'soci-snapshotter-grpc',
      command: await sociSnapshotterProgram(),
      parameters: ['--address', address],
      environment: { SSL_CERT_FILE: trusted },
      log: path.join(directory, 'soci-snapshotter.log'),
      ready: () => grpcAnswers(address),
    });
    return {
      ...daemon,
      plugin: { name: 'soci', address, root: ROOT },
      stop: async (limit) => {
        await daemon.stop(limit);
        await release();
      },
    };
  } catch (error) {
    await release();
    throw error;
  }
}
