/**
 * The daemons of this node as a command finds them: by the configuration they were started with.
 */
import { constants } from 'node:fs';
import { access } from 'node:fs/promises';
import type { Command } from 'commander';
import { loadConfiguration, type Configuration } from '../daemon/configuration.js';
import { layout } from '../daemon/layout.js';
import { CallError } from '../proto/unary-call.js';
import { BlobServeClient } from '../snapshotter/blobserve-client.js';
import { Failure } from './failure.js';

export interface NodeOptions {
  readonly config?: string;
  readonly root?: string;
}

/** Adds the options that say which daemons are meant. */
export function withNodeOptions(command: Command): Command {
  return command
    .option('--config <file>', "the snapshotter's configuration file (default: /etc/erofs-nbd/config.toml)")
    .option('--root <directory>', "the snapshotter's root directory (default: as configured)");
}

export function nodeConfiguration({ config, root }: NodeOptions): Configuration {
  return loadConfiguration(config, root === undefined ? {} : { root });
}

/**
 * Makes calls of the data plane.
 *
 * @throws {Failure} when there is none, it does not answer, or it is not for us to ask
 */
export async function askDataPlane<T>(
  root: string,
  questions: (client: BlobServeClient) => Promise<T>,
): Promise<T> {
  const socket = layout(root).controlSocket;
  try {
    await access(socket, constants.R_OK | constants.W_OK);
  } catch (error) {
    const { code = String(error) } = error as NodeJS.ErrnoException;
    if (code === 'EACCES' || code === 'EPERM') {
      throw new Failure(
        `${socket} is for root alone, who attaches the layers it tells of: try again as root`,
      );
    }
    throw new Failure(
      code === 'ENOENT'
        ? `nothing serves layers below ${root}: is erofs-nbd-snapshotter running, and is that its root (--root)?`
        : `${socket}: ${code}`,
    );
  }
  const client = new BlobServeClient(socket);
  try {
    return await questions(client);
  } catch (error) {
    if (!(error instanceof CallError) || error.answered) throw error;
    throw new Failure(
      `the data plane below ${root} does not answer (${error.message}): look at the snapshotter's log`,
      undefined,
      { cause: error },
    );
  } finally {
    client.close();
  }
}
