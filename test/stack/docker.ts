/**
 * Docker's daemon on a containerd of ours: its images are containerd's, and its builder is BuildKit with the worker for
 * containerd, as nerdctl's build uses it.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { dockerFrom, type DockerSuite } from '../debian/packages.js';
import type { Containerd } from './containerd.js';
import { startDaemon } from './daemon-process.js';
import { absentDirectories, removeEmpty } from './shared-directories.js';

export interface DockerOptions {
  /** The stack's private directory. */
  readonly directory: string;
  readonly containerd: Containerd;
  /** A Debian suite, whose Docker is fetched privately. */
  readonly version: DockerSuite;
  /** What a user has in `daemon.json`, which makes it use the snapshotter. */
  readonly configuration: Readonly<Record<string, unknown>>;
}

export interface Docker {
  /** `28.5.2+dfsg4`, … */
  readonly version: string;
  /** Runs `docker`; rejects with what it printed when it fails. @returns what it printed on standard output */
  docker(...parameters: string[]): Promise<string>;
  /**
   * Builds what these lines say, with {@link context} at hand.
   *
   * @returns what the builder says of its steps
   */
  build(dockerfile: readonly string[], ...parameters: string[]): Promise<string>;
  /** The directory of files for COPY. */
  readonly context: string;
  stop(): Promise<void>;
}

/** Docker and the builder's runc use these of the whole machine; the deepest first. */
const SHARED = ['/run/docker/plugins', '/run/docker', '/run/runc'];

/** Starts Docker's daemon in containerd's namespace and answers when it does. */
export async function startDocker(options: DockerOptions): Promise<Docker> {
  const { directory, containerd } = options;
  const programs = await dockerFrom(options.version);
  const home = path.join(directory, 'docker');
  const context = path.join(home, 'context');
  await mkdir(context, { recursive: true });
  const address = `unix://${home}/docker.sock`;
  const environment = {
    PATH: containerd.environment['PATH'] ?? '',
    DOCKER_HOST: address,
    DOCKER_CONFIG: home,
  };
  await writeFile(
    path.join(home, 'config.json'),
    JSON.stringify({ cliPluginsExtraDirs: [programs.plugins] }),
  );
  const configuration = path.join(home, 'daemon.json');
  await writeFile(
    configuration,
    JSON.stringify({
      ...options.configuration,
      containerd: containerd.address,
      'containerd-namespace': containerd.namespace,
      'containerd-plugins-namespace': `${containerd.namespace}-plugins`,
      'data-root': path.join(home, 'data'),
      'exec-root': path.join(home, 'exec'),
      pidfile: path.join(home, 'docker.pid'),
      hosts: [address],
      group: 'root',
      // Containers have the machine's network or none: nothing of the machine's own is set up.
      bridge: 'none',
      'ip-forward': false,
      iptables: false,
      ip6tables: false,
      'userland-proxy': false,
      'exec-opts': ['native.cgroupdriver=cgroupfs'],
      'cgroup-parent': containerd.namespace,
    }),
  );
  const run = (...parameters: string[]) =>
    execa(programs.docker, parameters, { env: environment, stdin: 'ignore', cwd: home });
  const absent = await absentDirectories(SHARED);
  const daemon = await startDaemon({
    name: 'dockerd',
    command: programs.dockerd,
    parameters: ['--config-file', configuration],
    log: path.join(directory, 'docker.log'),
    environment,
    ready: () =>
      run('version').then(
        () => true,
        () => false,
      ),
  });
  const docker = async (...parameters: string[]): Promise<string> => (await run(...parameters)).stdout;
  return {
    version: await docker('version', '--format', '{{.Server.Version}}'),
    docker,
    context,
    build: async (dockerfile, ...parameters) => {
      const file = path.join(home, 'Dockerfile');
      await writeFile(file, `${dockerfile.join('\n')}\n`);
      const choice = ['--progress', 'plain', '--network', 'host', '--file', file];
      return (await run('build', ...choice, ...parameters, context)).stderr;
    },
    stop: async () => {
      await daemon.stop();
      await removeEmpty(absent);
    },
  };
}
