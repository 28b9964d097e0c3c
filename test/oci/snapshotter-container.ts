/**
 * The snapshotter of the OCI image as a container, the way a DaemonSet of Kubernetes runs it: privileged, with the network, the
 * processes and the control groups of the node, and mounts that the node sees.
 */
import { access, mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { execa } from 'execa';
import { layout } from '../../daemon/layout.js';
import { patience } from '../patience.js';
import type { Containerd, ProxyPlugin } from '../stack/containerd.js';
import { grpcAnswers } from '../stack/socket.js';

/** Where the node's control groups are made; on one with those of version 1, the hierarchy that runtimes end containers by. */
async function controlGroups(): Promise<{ directory: string; unified: boolean }> {
  const unified = await access('/sys/fs/cgroup/cgroup.controllers').then(
    () => true,
    () => false,
  );
  return { directory: unified ? '/sys/fs/cgroup' : '/sys/fs/cgroup/devices', unified };
}

export class SnapshotterContainer {
  #runs = 0;

  private constructor(
    readonly plugin: ProxyPlugin,
    private readonly image: string,
    private readonly entrypoint: readonly string[],
    private readonly configuration: string,
    readonly controlGroup: string,
    private readonly unified: boolean,
  ) {}

  /**
   * @param directory the stack's
   * @param entrypoint of the image: ctr leaves it out where it is given arguments
   */
  static async prepare(
    directory: string,
    image: string,
    entrypoint: readonly string[],
  ): Promise<SnapshotterContainer> {
    const root = path.join(directory, 'erofs-nbd');
    const sockets = path.join(directory, 'run');
    await mkdir(root);
    await mkdir(sockets);
    // As /var/lib is under systemd: what is mounted in a container is seen here.
    await execa('mount', ['--bind', root, root]);
    await execa('mount', ['--make-shared', root]);
    const { directory: groups, unified } = await controlGroups();
    const controlGroup = path.join(groups, `${path.basename(directory)}-serving`);
    const plugin = { name: 'erofs-nbd', address: path.join(sockets, 'snapshotter.sock'), root };
    const configuration = path.join(directory, 'erofs-nbd.toml');
    const lines = [
      `root = ${JSON.stringify(root)}`,
      `address = ${JSON.stringify(plugin.address)}`,
      '[recovery]',
      `control_group = ${JSON.stringify(controlGroup)}`,
    ];
    await writeFile(configuration, `${lines.join('\n')}\n`);
    return new SnapshotterContainer(plugin, image, entrypoint, configuration, controlGroup, unified);
  }

  /** The container's name. */
  get name(): string {
    return `snapshotter-${this.#runs}`;
  }

  async start(containerd: Containerd): Promise<void> {
    this.#runs += 1;
    const bind = (place: string, options: string): string[] => [
      '--mount',
      `type=bind,src=${place},dst=${place},options=${options}`,
    ];
    await containerd.ctr(
      ...[
        'run',
        '-d',
        '--snapshotter',
        'overlayfs',
        '--privileged',
        '--net-host',
        '--rootfs-propagation',
        'rshared',
      ],
      ...['--with-ns', `pid:/proc/${process.pid}/ns/pid`],
      ...(this.unified ? ['--with-ns', `cgroup:/proc/${process.pid}/ns/cgroup`] : []),
      ...bind('/dev', 'rbind:rw'),
      ...bind('/sys', 'rbind:rw'),
      ...bind(this.plugin.root, 'rbind:rshared:rw'),
      ...bind(path.dirname(this.plugin.address), 'rbind:rw'),
      ...bind(this.configuration, 'rbind:ro'),
      ...[this.image, this.name, 'sh', '-c', `exec "$@" >>${this.log} 2>&1`, 'sh', ...this.entrypoint],
      ...['--config', this.configuration, '--handover'],
    );
    const deadline = Date.now() + patience(60_000);
    // After it was away for a while, containerd tries to connect from time to time only, and fails calls meanwhile.
    const list = ['snapshots', '--snapshotter', this.plugin.name, 'ls'];
    for (;;) {
      const isThere = await grpcAnswers(this.plugin.address);
      if (isThere && (await containerd.ctr(...list).then(Boolean, () => false))) return;
      if (Date.now() > deadline) throw new Error('the snapshotter in the container does not answer');
      await delay(50);
    }
  }

  /** What it printed, in all its runs. */
  get log(): string {
    return path.join(path.dirname(this.plugin.address), 'erofs-nbd.log');
  }

  /** The command of the image, in the running container. */
  async command(containerd: Containerd, ...parameters: string[]): Promise<string> {
    const id = `command-${process.hrtime.bigint()}`;
    const command = ['erofs-nbd', ...parameters, '--config', this.configuration];
    return String((await containerd.ctr('task', 'exec', '--exec-id', id, this.name, ...command)).stdout);
  }

  /** Its first process, as the node sees it. */
  async mainPid(containerd: Containerd): Promise<number> {
    const { stdout } = await containerd.ctr('task', 'ls');
    const line = String(stdout)
      .split('\n')
      .map((text) => text.trim().split(/\s+/))
      .find(([task]) => task === this.name);
    if (line === undefined || line[2] !== 'RUNNING') throw new Error(`${this.name} does not run`);
    return Number(line[1]);
  }

  /** The data plane's process. */
  async serving(): Promise<number> {
    const text = await readFile(layout(this.plugin.root).blobserveProcess, 'utf8');
    return (JSON.parse(text) as { pid: number }).pid;
  }

  /** The keeper's process; undefined when there is none. */
  async keeper(): Promise<number | undefined> {
    const text = await readFile(layout(this.plugin.root).fuseKeeper, 'utf8').catch(() => undefined);
    return text === undefined ? undefined : (JSON.parse(text) as { pid: number }).pid;
  }

  /** Sends its first process a signal, and removes the container with its files when it has ended. */
  async end(containerd: Containerd, signal: 'SIGTERM' | 'SIGKILL'): Promise<void> {
    await containerd.ctr('task', 'kill', '--signal', signal, this.name);
    await this.remove(containerd);
  }

  /** Removes what is left of a container whose first process has ended. */
  async remove(containerd: Containerd): Promise<void> {
    const deadline = Date.now() + patience(60_000);
    for (;;) {
      const { stdout } = await containerd.ctr('task', 'ls');
      const line = String(stdout)
        .split('\n')
        .find((text) => text.startsWith(`${this.name} `));
      if (line === undefined || line.includes('STOPPED')) break;
      if (Date.now() > deadline) throw new Error(`${this.name} does not end`);
      await delay(50);
    }
    await containerd.ctr('task', 'rm', '--force', this.name).catch(() => undefined);
    await containerd.ctr('container', 'rm', this.name);
  }
}
