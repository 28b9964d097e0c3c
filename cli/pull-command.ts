/**
 * `erofs-nbd pull IMAGE`: the command around `pull.ts`.
 */
import process from 'node:process';
import { Option, type Command } from 'commander';
import type { Platform } from '../blobserve/registry/platform.js';
import { openRegistryClient } from '../blobserve/open-registry-client.js';
import { loadConfiguration } from '../daemon/configuration.js';
import { createLogger } from '../daemon/log.js';
import { CallError } from '../proto/unary-call.js';
import { ContainerdClient } from '../snapshotter/containerd-client.js';
import { noContainerd, withContainerdOptions, type ContainerdOptions } from './containerd-options.js';
import { Failure } from './failure.js';
import { imageArgument } from './image-argument.js';
import { platformOption } from './platform-option.js';
import { openProgress } from './progress.js';
import { pull } from './pull.js';
import { interruptible, print } from './terminal.js';

interface PullCommandLine extends ContainerdOptions {
  readonly config?: string;
  readonly snapshotter: string;
  readonly platform: Platform;
  readonly quiet?: true;
  readonly json?: true;
}

export function addPullCommand(program: Command): void {
  withContainerdOptions(
    program
      .command('pull')
      .description('pull an image whose layers are fetched when they are read; any client can run it then')
      .argument('<image>', 'host[:port]/repository[:tag][@digest], or a short name of Docker Hub')
      .option(
        '--config <file>',
        "the snapshotter's configuration file (default: /etc/erofs-nbd/config.toml)",
      ),
  )
    .addOption(
      new Option('--snapshotter <name>', "the snapshotter's name in containerd's configuration")
        .env('CONTAINERD_SNAPSHOTTER')
        .default('erofs-nbd'),
    )
    .addOption(platformOption())
    .option('-q, --quiet', 'show no progress')
    .option('--json', 'print the result as JSON')
    .action(pullImage);
}

async function pullImage(image: string, options: PullCommandLine): Promise<void> {
  const configuration = loadConfiguration(options.config);
  const reference = imageArgument(image);
  const containerd = new ContainerdClient(options.address ?? configuration.containerd.address);
  const registry = openRegistryClient(configuration, createLogger('erofs-nbd pull', 'warn', 'text'));
  const progress = openProgress(process.stderr, options.quiet === true || options.json === true);
  const startedAt = performance.now();
  try {
    const { name, digest, outcomes } = await interruptible((signal) =>
      pull(reference, {
        containerd,
        registry,
        namespace: options.namespace,
        snapshotter: options.snapshotter,
        platform: options.platform,
        progress,
        signal,
      }),
    );
    progress.close();
    const seconds = Number(((performance.now() - startedAt) / 1000).toFixed(1));
    const lazy = outcomes.filter((outcome) => outcome !== 'unpacked').length;
    await print(
      options.json === true
        ? `${JSON.stringify({ image: name, digest, layers: outcomes.length, lazy, seconds })}\n`
        : `${name} ${digest}: ${lazy} of ${outcomes.length} layers lazy, ${seconds} s\n`,
    );
  } catch (error) {
    throw error instanceof CallError ? explained(error, containerd.address, options) : error;
  } finally {
    progress.close();
    containerd.close();
    await registry.close();
  }
}

/** What containerd says, with what to do about it where that is known. */
function explained(error: CallError, address: string, { snapshotter }: PullCommandLine): Error {
  if (error.message.includes('snapshotter not loaded')) {
    return new Failure(
      `containerd on ${address} has no snapshotter ${JSON.stringify(snapshotter)}: add [proxy_plugins.${snapshotter}] to ` +
        'its configuration and restart it, or name another with --snapshotter',
      undefined,
      { cause: error },
    );
  }
  return noContainerd(error, address) ?? error;
}
