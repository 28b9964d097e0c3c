/** Where mounts by hand are written down: the same for all commands about them. */
import { realpath } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { type Command, Option } from 'commander';
import { Failure } from '../failure.js';
import { DEFAULT_RUNTIME, type RecordedMount, recordedMounts } from './record.js';

export interface RuntimeOptions {
  readonly runtime: string;
}

export function withRuntimeOption(command: Command): Command {
  return command.addOption(
    new Option('--runtime <directory>', 'where mounts are written down; a reboot has to empty it')
      .env('EROFS_NBD_MOUNT_RUNTIME')
      .default(DEFAULT_RUNTIME)
      .argParser((text) => path.resolve(text)),
  );
}

/** @throws {Failure} naming the command's object and what the user can do */
export function demandRoot(what: string): void {
  if (process.getuid?.() !== 0) {
    throw new Failure(`${what} needs root: it asks the kernel for a device and a mount`);
  }
}

/** @throws {Failure} of another user's, most often root's */
export async function mountsIn(runtime: string): Promise<RecordedMount[]> {
  try {
    return await recordedMounts(runtime);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'EACCES' && code !== 'EPERM') throw error;
    throw new Failure(`${runtime} is for root alone, who mounts: try again as root`);
  }
}

/**
 * The mount that is meant, by its mount point or a device of it.
 *
 * @throws {Failure} there is none
 */
export async function mountMeant(
  runtime: string,
  text: string,
  devicesOf: (mount: RecordedMount) => readonly string[] = () => [],
): Promise<RecordedMount> {
  const place = path.resolve(text);
  const all = await mountsIn(runtime);
  const at = (mountPoint: string): RecordedMount | undefined =>
    all.find(({ record }) => record.mountPoint === mountPoint);
  const found =
    at(place) ??
    all.find((mount) => devicesOf(mount).includes(place)) ??
    // By way of a symbolic link. Last: whoever looks at a device waits for who serves it.
    at(await realpath(place).catch(() => place));
  if (found !== undefined) return found;
  throw new Failure(
    `${text}: nothing is mounted there by erofs-nbd mount; \`erofs-nbd list\` shows what is` +
      (all.length === 0 ? ' (nothing)' : ''),
  );
}
