/**
 * Our snapshotter as users start it, and the end of its data plane, which outlives it on purpose.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { layout } from '../../daemon/layout.js';
import type { control } from '../../proto/messages.js';
import { BlobServeClient } from '../../snapshotter/blobserve-client.js';
import { endKeeper } from '../../snapshotter/fuse-keeper.js';
import { isRunning, processIdentity } from '../../snapshotter/process-identity.js';
import { checkout } from '../debian/packages.js';
import { patience } from '../patience.js';
import type { ProxyPlugin } from './containerd.js';
import { startDaemon, type Daemon, type DaemonOptions } from './daemon-process.js';
import { unmountBelow } from './leftovers.js';
import { grpcAnswers } from './socket.js';

export interface SnapshotterOptions {
  /** The stack's private directory. */
  readonly directory: string;
  /** Default `erofs-nbd`; another for a second snapshotter in one stack. */
  readonly name?: string;
  /** Lines of the configuration file, in TOML; default: none but the defaults. */
  readonly configuration?: string;
  readonly logLevel?: string;
  /** Added to its command line. */
  readonly parameters?: readonly string[];
  /** Default: the checkout's own, built; another version's otherwise. */
  readonly main?: string;
  /** Added to its environment. */
  readonly environment?: Readonly<Record<string, string>>;
  readonly listening?: DaemonOptions['listening'];
}

export interface Snapshotter extends Daemon {
  readonly plugin: ProxyPlugin;
  /** What blobserve serves at the moment, with statistics; undefined when none runs. */
  devices(): Promise<control.ListResponse['devices'] | undefined>;
  /** Who serves, over which backend and why; undefined when none runs. */
  hello(): Promise<control.HelloResponse | undefined>;
  /** Ends the snapshotter alone, as a restart or an upgrade does: containers go on. */
  stop(limit?: number): Promise<void>;
  /** Ends the data plane too, by force when something is still attached. After {@link stop}. */
  stopServing(): Promise<void>;
}

/** The daemon's file, as `npm run build` leaves it. */
const MAIN = path.join(checkout, 'dist', 'snapshotter', 'main.js');

/** Where containerd finds the snapshotter of a stack, before it runs. */
export function pluginOf(directory: string, name = 'erofs-nbd'): ProxyPlugin {
  return { name, address: path.join(directory, `${name}.sock`), root: path.join(directory, name) };
}

export async function startSnapshotter(options: SnapshotterOptions): Promise<Snapshotter> {
  const { directory } = options;
  const plugin = pluginOf(directory, options.name);
  const configuration = path.join(directory, `${plugin.name}.toml`);
  await mkdir(plugin.root, { recursive: true });
  await writeFile(configuration, options.configuration ?? 'version = 1\n');
  const { name, address, root } = plugin;
  const daemon = await startDaemon({
    name,
    command: process.execPath,
    parameters: [
      options.main ?? MAIN,
      ...['--config', configuration, '--root', root, '--address', address],
      ...['--log-level', options.logLevel ?? 'debug'],
      ...(options.parameters ?? []),
    ],
    log: path.join(directory, `${name}.log`),
    ...(options.environment && { environment: options.environment }),
    ...(options.listening && { listening: options.listening }),
    ready: () => grpcAnswers(address),
  });
  const socket = layout(root).controlSocket;
  return {
    ...daemon,
    plugin,
    devices: async () => (await ask(socket, (blobserve) => blobserve.list()))?.devices,
    hello: () => ask(socket, (blobserve) => blobserve.hello()),
    stopServing: async () => {
      const server = await ask(socket, (blobserve) => blobserve.hello());
      // Layers first: a device below a mount cannot go. The FUSE file system's own mount is blobserve's to end.
      await unmountBelow(path.join(root, 'snapshots'));
      await unmountBelow(layout(root).layers);
      const serving = server && (await processIdentity(server.pid));
      if (server !== undefined) await ask(socket, (blobserve) => blobserve.shutdown(true));
      const deadline = Date.now() + patience(15_000);
      while (serving && (await isRunning(serving)) && Date.now() < deadline) await delay(20);
      await endKeeper(layout(root).fuseKeeper);
    },
  };
}

/** Asks blobserve something; undefined when none runs. */
async function ask<Answer>(
  socket: string,
  question: (blobserve: BlobServeClient) => Promise<Answer>,
): Promise<Answer | undefined> {
  if (!(await grpcAnswers(socket))) return undefined;
  const client = new BlobServeClient(socket);
  try {
    return await question(client);
  } finally {
    client.close();
  }
}
