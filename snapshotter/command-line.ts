/**
 * What `erofs-nbd-snapshotter` may be told on its command line.
 */
import { Command, Option } from 'commander';
import { LOG_LEVELS } from '../daemon/log.js';
import { VERSION } from '../daemon/version.js';

export interface CommandLine {
  readonly config?: string;
  readonly root?: string;
  readonly address?: string;
  readonly logLevel?: string;
  readonly teardown?: true;
  readonly force?: true;
  readonly handover?: true;
}

export function snapshotterCommand(): Command {
  return new Command('erofs-nbd-snapshotter')
    .description('containerd snapshotter that starts containers without waiting for their images')
    .version(VERSION)
    .option(
      '--config <file>',
      'configuration file (default: /etc/erofs-nbd/config.toml, which may be absent)',
    )
    .option('--root <directory>', 'where snapshots, cache and database live (default: /var/lib/erofs-nbd)')
    .option('--address <socket>', 'socket for containerd (default: /run/erofs-nbd/snapshotter.sock)')
    .addOption(new Option('--log-level <level>', 'how much to log').choices([...LOG_LEVELS]))
    .option(
      '--teardown',
      'detach every layer, end the data plane, and exit: before an uninstall; refused while snapshots use layers',
    )
    .option(
      '--force',
      'with --teardown: also while snapshots use layers; containers that run lose their files',
    )
    .option('--handover', 'replace the running data plane by a new one, which takes its devices over')
    .showHelpAfterError()
    .configureOutput({ outputError: (text, write) => write(text) });
}
