#!/usr/bin/env node
/**
 * The daemon `erofs-nbd-snapshotter`, in the foreground.
 */
import process from 'node:process';
import { ConfigurationError, loadConfiguration } from '../daemon/configuration.js';
import { createLogger } from '../daemon/log.js';
import { closeTracing, openTracing } from '../daemon/tracing.js';
import { MetadataError } from '../metadata/errors.js';
import { RootInUseError } from '../metadata/root-lock.js';
import { snapshotterCommand, type CommandLine } from './command-line.js';
import { Daemon, LayersInUseError } from './daemon.js';
import { ServiceManager } from './service-manager.js';
import { SocketError } from './socket.js';

async function main(): Promise<void> {
  const options = snapshotterCommand()
    .exitOverride((error) => process.exit(error.exitCode === 0 ? 0 : 2))
    .parse()
    .opts<CommandLine>();
  const { config, root, address, logLevel } = options;
  const configuration = loadConfiguration(config, {
    ...(root === undefined ? {} : { root }),
    ...(address === undefined ? {} : { address }),
    ...(logLevel === undefined ? {} : { logLevel }),
  });
  if (process.getuid?.() !== 0) {
    throw new ConfigurationError(
      'erofs-nbd-snapshotter mounts file systems and attaches devices: start it as root',
    );
  }
  const log = createLogger('snapshotter', configuration.log.level, configuration.log.format);
  process.on('uncaughtException', (error) => {
    // State is in SQLite and in the kernel; the data plane goes on. Better a new start than an unknown state.
    log.fatal({ err: error }, 'a fault of the program: ending; the data plane goes on serving');
    process.exit(70);
  });
  const shared = [
    ...(config === undefined ? [] : ['--config', config]),
    '--root',
    configuration.root,
    '--log-level',
    configuration.log.level,
  ];
  await openTracing('erofs-nbd-snapshotter', configuration, log);
  // Before anything is started that would inherit what systemd said.
  const manager = new ServiceManager(process.env, log);
  const daemon = new Daemon({
    configuration,
    sharedArguments: shared,
    handover: options.handover === true,
    store: manager,
    log,
  });
  if (options.teardown === true) {
    await daemon.teardown(options.force === true);
    return;
  }
  let stopping = false;
  const stop = (signal: NodeJS.Signals): void => {
    if (stopping) return;
    stopping = true;
    manager.stopping();
    log.info({ signal }, 'stopping; what containers read goes on being served');
    daemon
      .stop()
      .finally(closeTracing)
      .then(
        () => process.exit(0),
        (error: unknown) => {
          log.error({ err: error }, 'stopped with an error');
          process.exit(1);
        },
      );
  };
  process.on('SIGTERM', stop);
  process.on('SIGINT', stop);
  await daemon.start();
  manager.ready(`serving on ${configuration.address}`);
}

main().catch((error: unknown) => {
  const known =
    error instanceof ConfigurationError ||
    error instanceof RootInUseError ||
    error instanceof LayersInUseError ||
    error instanceof MetadataError ||
    error instanceof SocketError;
  const text =
    error instanceof Error ? (known ? error.message : (error.stack ?? error.message)) : String(error);
  process.stderr.write(`erofs-nbd-snapshotter: ${text}\n`);
  process.exit(1);
});
