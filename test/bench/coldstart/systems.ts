/**
 * What is compared: a containerd with a snapshotter, as its own documentation says it is set up, and the tool that it says
 * pulls. Every setting that is not a default is in `settings`.
 */
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { execa } from 'execa';
import { ctrRemoteProgram, sociProgram } from '../../debian/packages.js';
import { erofsUtilsProgram, fetchErofsUtils } from '../../erofs-utils.js';
import { makeCertificates, type Certificates } from '../../faults/certificates.js';
import { architecture } from '../../image/oci-layout.js';
import type { Containerd, ProxyPlugin } from '../../stack/containerd.js';
import type { Daemon } from '../../stack/daemon-process.js';
import { startSociSnapshotter } from '../../stack/soci-snapshotter.js';
import type { Stack } from '../../stack/stack.js';
import { startStargzSnapshotter } from '../../stack/stargz-snapshotter.js';

/** Daemons that have just been started, with nothing in their directories. */
export interface ColdNode {
  readonly containerd: Containerd;
  /** As containerd knows it. */
  readonly snapshotter: string;
  readonly pull: (reference: string) => Promise<unknown>;
  /** What is counted as its memory, by name: process identifiers. */
  readonly daemons: () => Promise<Readonly<Record<string, number>>>;
}

export interface ColdSystem {
  readonly name: string;
  readonly ours: boolean;
  /** A key of contents.ts. */
  readonly content: string;
  readonly settings: string;
  /** Whether the registry offers it TLS beside plain HTTP; ours and containerd would take it. */
  readonly tls?: true;
  /** @param registry `127.0.0.1:port` as the node sees it */
  readonly start: (stack: Stack, registry: string) => Promise<ColdNode>;
}

const ctrPull =
  (containerd: Containerd, snapshotter: string) =>
  (reference: string): Promise<unknown> =>
    containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', snapshotter, reference);

interface OurChoices {
  readonly name: string;
  readonly content: string;
  /** Lines of config.toml; default: none. */
  readonly configuration?: string;
}

/** Ours, with defaults and what `configuration` changes of them. */
function ours({ name, content, configuration }: OurChoices): ColdSystem {
  return {
    ...{ name, content, ours: true },
    settings: `registry.insecure; ${configuration?.trim().replaceAll('\n', ' ') ?? 'else defaults'}`,
    start: async (stack, registry) => {
      const snapshotter = await stack.startSnapshotter({
        configuration: `version = 1\n[registry]\ninsecure = ["${registry}"]\n${configuration ?? ''}`,
        logLevel: 'info',
      });
      const containerd = await stack.startContainerd({ snapshotters: [snapshotter.plugin] });
      // Its socket answers before its data plane has started.
      while ((await snapshotter.hello()) === undefined) await delay(20);
      return {
        ...{ containerd, snapshotter: 'erofs-nbd', pull: ctrPull(containerd, 'erofs-nbd') },
        daemons: async () => ({
          containerd: containerd.pid,
          'erofs-nbd-snapshotter': snapshotter.pid,
          blobserve: (await snapshotter.hello())?.pid ?? 0,
        }),
      };
    },
  };
}

const overlayfs: ColdSystem = {
  ...{ name: 'overlayfs', content: 'tar.gz', ours: false },
  settings: 'defaults',
  start: async (stack) => {
    const containerd = await stack.startContainerd();
    return {
      ...{ containerd, snapshotter: 'overlayfs', pull: ctrPull(containerd, 'overlayfs') },
      daemons: () => Promise.resolve({ containerd: containerd.pid }),
    };
  },
};

/** As its page has it, for erofs-utils from 1.8.2 on; the transfer service has to be told of the differ too. */
const EROFS_CONFIGURATION = `version = 2
[plugins."io.containerd.service.v1.diff-service"]
  default = ["erofs", "walking"]
[plugins."io.containerd.differ.v1.erofs"]
  mkfs_options = ["-T0", "--mkfs-time", "--sort=none"]
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/${architecture()}"
  snapshotter = "erofs"
  differ = "erofs"
`;

const erofs: ColdSystem = {
  ...{ name: 'erofs', content: 'tar.gz', ours: false },
  settings: 'differ erofs, mkfs_options -T0 --mkfs-time --sort=none, an unpack_config for it',
  start: async (stack) => {
    fetchErofsUtils();
    const programs = path.join(stack.directory, 'erofs-utils');
    await erofsUtilsProgram('mkfs.erofs', programs);
    const containerd = await stack.startContainerd({ pasted: EROFS_CONFIGURATION, programs: [programs] });
    return {
      ...{ containerd, snapshotter: 'erofs', pull: ctrPull(containerd, 'erofs') },
      daemons: () => Promise.resolve({ containerd: containerd.pid }),
    };
  },
};

/** A containerd that knows the peer, which runs: with a plugin of three lines, as the peers' own pages have it. */
async function besides(stack: Stack, plugin: ProxyPlugin): Promise<Containerd> {
  return stack.startContainerd({ snapshotters: [plugin], annotations: false });
}

/** The registry's for TLS, which only SOCI asks for. */
export const certificates = (() => {
  let made: Certificates | undefined;
  return (): Certificates => (made ??= makeCertificates());
})();

const soci: ColdSystem = {
  ...{ name: 'soci', content: 'soci', ours: false, tls: true },
  settings:
    'defaults, no configuration file; indexes by TLS from the same port, with SSL_CERT_FILE; soci image rpull',
  start: async (stack) => {
    const daemon = await stack.startPeer((directory) => startSociSnapshotter(directory, certificates().ca));
    const containerd = await besides(stack, daemon.plugin);
    const program = await sociProgram();
    return {
      ...{ containerd, snapshotter: 'soci' },
      pull: (reference) =>
        execa(program, ['image', 'rpull', '--plain-http', reference], { env: containerd.environment }),
      daemons: () => Promise.resolve(pids(containerd, daemon)),
    };
  },
};

/** @param content eStargz, made in one way or another */
const stargz = (name: string, content: string): ColdSystem => ({
  ...{ name, content, ours: false },
  settings: 'defaults, no configuration file; ctr-remote image rpull',
  start: async (stack) => {
    const daemon = await stack.startPeer(startStargzSnapshotter);
    const containerd = await besides(stack, daemon.plugin);
    const program = await ctrRemoteProgram();
    return {
      ...{ containerd, snapshotter: 'stargz' },
      pull: (reference) =>
        execa(program, ['image', 'rpull', '--plain-http', reference], { env: containerd.environment }),
      daemons: () => Promise.resolve(pids(containerd, daemon)),
    };
  },
});

const pids = (containerd: Containerd, daemon: Daemon): Record<string, number> => ({
  containerd: containerd.pid,
  [daemon.name]: daemon.pid,
});

export const SYSTEMS: readonly ColdSystem[] = [
  ours({ name: 'erofs-nbd-native', content: 'native' }),
  ours({ name: 'erofs-nbd-native-zstd', content: 'native-zstd' }),
  ours({ name: 'erofs-nbd-index', content: 'index' }),
  ours({ name: 'erofs-nbd-native-list', content: 'native-list' }),
  ours({ name: 'erofs-nbd-native-zstd-list', content: 'native-zstd-list' }),
  ours({ name: 'erofs-nbd-index-list', content: 'index-list' }),
  ours({ name: 'erofs-nbd-soci', content: 'soci' }),
  ours({ name: 'erofs-nbd-estargz', content: 'estargz' }),
  ours({ name: 'erofs-nbd-estargz-optimized', content: 'estargz-optimized' }),
  overlayfs,
  erofs,
  soci,
  stargz('stargz', 'estargz'),
  stargz('stargz-optimized', 'estargz-optimized'),
];
