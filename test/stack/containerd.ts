/**
 * A containerd of our own: root, state, sockets and namespace are private, so that one installed on this system is not
 * touched.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa, type Result } from 'execa';
import { architecture } from '../image/oci-layout.js';
import { containerdFrom, installedProgram, program, type ContainerdSuite } from '../debian/packages.js';
import { startDaemon, type Daemon } from './daemon-process.js';
import { absentDirectories, removeEmpty } from './shared-directories.js';
import { grpcAnswers } from './socket.js';

/** A snapshotter that containerd reaches over a socket. */
export interface ProxyPlugin {
  readonly name: string;
  readonly address: string;
  readonly root: string;
}

export interface ContainerdOptions {
  /** The stack's private directory. */
  readonly directory: string;
  /** A Debian suite, whose containerd is fetched privately (default: sid's, 2.x); `installed`: the one of this system. */
  readonly version?: ContainerdSuite | 'installed';
  readonly snapshotters?: readonly ProxyPlugin[];
  /** Kubernetes' interface, left out by default; it uses the first of `snapshotters`. */
  readonly cri?: boolean;
  /** A configuration as a user would paste it, in place of what is made of `snapshotters`; its first line is the version. */
  readonly pasted?: string;
  /** What the snapshotters can do beside the usual, as containerd's configuration says it: `remap-ids`. */
  readonly capabilities?: readonly string[];
  /** Whether clients of the transfer service tell the snapshotter which image they pull; default: they do. */
  readonly annotations?: boolean;
  /** Directories in which it finds programs before all others. */
  readonly programs?: readonly string[];
}

export interface Containerd extends Daemon {
  readonly address: string;
  /** Its own directory, which holds its `config.toml`. */
  readonly home: string;
  /** Ours alone: runc's state and cgroups of this system are found by it. */
  readonly namespace: string;
  /** `2.1.9`, … */
  readonly version: string;
  readonly programs: string;
  /** Environment under which `ctr` speaks to this containerd. */
  readonly environment: Readonly<Record<string, string>>;
  /** Runs `ctr`; rejects with what it printed when it fails. */
  ctr(...parameters: string[]): Promise<Result>;
  /** Kills and removes every container and image, so that every snapshot is given back. */
  removeAll(): Promise<void>;
  /** Ends it, as an upgrade does, and starts it again; containers go on. `whileDown` runs in between. */
  restart(whileDown?: () => Promise<void>): Promise<void>;
}

const NOT_OURS = [
  'io.containerd.nri.v1.nri',
  'io.containerd.internal.v1.opt',
  'io.containerd.internal.v1.tracing',
];
const CRI = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime'];

function configuration(options: ContainerdOptions, home: string, version: string): string {
  const [major = 0, minor = 0] = version.split('.').map(Number);
  const hasTransfer = major > 1 || minor >= 7;
  const quote = JSON.stringify;
  const { snapshotters = [], cri = false, annotations = true, capabilities } = options;
  const [first = '', ...rest] = options.pasted?.split('\n') ?? ['version = 2'];
  const lines = [
    first,
    `root = ${quote(path.join(home, 'root'))}`,
    `state = ${quote(path.join(home, 'state'))}`,
    // Node resource interface and /opt/containerd are of the whole machine: they are not ours to use.
    `disabled_plugins = ${quote([...NOT_OURS, ...(cri ? [] : CRI)])}`,
    '[grpc]',
    `  address = ${quote(path.join(home, 'containerd.sock'))}`,
    '[ttrpc]',
    `  address = ${quote(path.join(home, 'containerd.sock.ttrpc'))}`,
  ];
  if (options.pasted !== undefined) return [...lines, ...rest].join('\n');
  for (const { name, address, root } of snapshotters) {
    lines.push(
      `[proxy_plugins.${quote(name)}]`,
      '  type = "snapshot"',
      `  address = ${quote(address)}`,
      ...(capabilities === undefined ? [] : [`  capabilities = ${quote(capabilities)}`]),
      `  [proxy_plugins.${quote(name)}.exports]`,
      `    root = ${quote(root)}`,
      ...(annotations ? ['    enable_remote_snapshot_annotations = "true"'] : []),
    );
  }
  const own = snapshotters[0]?.name;
  if (cri && own !== undefined) {
    lines.push(
      ...(major < 2
        ? ['[plugins."io.containerd.grpc.v1.cri".containerd]', '  disable_snapshot_annotations = false']
        : ['[plugins."io.containerd.cri.v1.images"]']),
      `  snapshotter = ${quote(own)}`,
    );
  }
  // A list of one's own replaces the default, so the built-in snapshotter is named too.
  for (const name of !hasTransfer ? [] : ['overlayfs', ...snapshotters.map((entry) => entry.name)]) {
    lines.push(
      '[[plugins."io.containerd.transfer.v1.local".unpack_config]]',
      `  platform = "linux/${architecture()}"`,
      `  snapshotter = ${quote(name)}`,
      '  differ = "walking"',
    );
  }
  return `${lines.join('\n')}\n`;
}

/** Shims and runc use these of the whole machine, whatever containerd's own directories are; the deepest first. */
const SHARED = ['/run/containerd/fifo', '/run/containerd/runc', '/run/containerd/s', '/run/containerd'];

async function programsOf(version: ContainerdSuite | 'installed'): Promise<string> {
  if (version !== 'installed') return containerdFrom(version);
  const installed = await installedProgram('containerd');
  if (installed === undefined) throw new Error('containerd is not installed on this system');
  return path.dirname(installed);
}

/** Starts containerd and answers when its socket does. */
export async function startContainerd(options: ContainerdOptions): Promise<Containerd> {
  const programs = await programsOf(options.version ?? 'sid');
  const containerd = path.join(programs, 'containerd');
  const said = (await execa(containerd, ['--version'])).stdout;
  const version = /\bv?(\d+\.\d+\.\d+)/.exec(said)?.[1] ?? 'unknown';
  const home = path.join(options.directory, 'containerd');
  await mkdir(home, { recursive: true });
  const file = path.join(home, 'config.toml');
  await writeFile(file, configuration(options, home, version));

  const address = path.join(home, 'containerd.sock');
  const namespace = path.basename(options.directory);
  const runc = path.dirname(await program('runc'));
  const first = (options.programs ?? []).map((directory) => `${directory}:`).join('');
  const searchPath = `${first}${programs}:${runc}:${process.env['PATH'] ?? ''}:/usr/sbin:/usr/bin:/sbin:/bin`;
  const absent = await absentDirectories(SHARED);
  const start = (): Promise<Daemon> =>
    startDaemon({
      name: `containerd ${version}`,
      command: containerd,
      parameters: ['--config', file, '--log-level', 'info'],
      log: path.join(options.directory, 'containerd.log'),
      environment: { PATH: searchPath },
      ready: () => grpcAnswers(address),
    });
  let daemon = await start();

  const environment = { PATH: searchPath, CONTAINERD_ADDRESS: address, CONTAINERD_NAMESPACE: namespace };
  const ctr = (...parameters: string[]): Promise<Result> =>
    execa(path.join(programs, 'ctr'), parameters, { env: environment, stdin: 'ignore' });
  const list = async (...parameters: string[]): Promise<string[]> => {
    const { stdout } = await ctr(...parameters, '--quiet');
    return String(stdout).split('\n').filter(Boolean);
  };
  const removeAll = async (): Promise<void> => {
    for (const task of await list('task', 'ls')) {
      await ctr('task', 'kill', '--signal', 'SIGKILL', task).catch(() => undefined);
      // Removing answers when the shim is gone; a task that ended by itself may be gone before.
      await ctr('task', 'rm', '--force', task).catch(() => undefined);
    }
    for (const container of await list('container', 'ls')) await ctr('container', 'rm', container);
    const images = await list('image', 'ls');
    if (images.length > 0) await ctr('image', 'rm', '--sync', ...images);
  };
  const stop = async (limit?: number): Promise<void> => {
    await daemon.stop(limit);
    await removeEmpty(absent);
  };
  const restart = async (whileDown?: () => Promise<void>): Promise<void> => {
    await daemon.stop();
    await whileDown?.();
    daemon = await start();
  };
  const { name, log } = daemon;
  return {
    ...{ name, log, address, home, namespace, version, programs, environment },
    get pid() {
      return daemon.pid;
    },
    get ended() {
      return daemon.ended;
    },
    kill: () => daemon.kill(),
    ...{ stop, restart, ctr, removeAll },
  };
}
