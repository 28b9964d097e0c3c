/**
 * Who sees the end of a mount's data plane: a shell that waits at a socket whose other end that process alone holds, and
 * becomes `erofs-nbd reattach` when it is closed. It takes no processor time and a megabyte, and holds the credentials that
 * were given by hand, in memory alone, for the next data plane.
 */
import { spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { createMemoryFile, readMemoryFile } from '../../blobserve/linux/memory-file.js';
import { takeDescriptor } from '../../blobserve/linux/pidfd.js';
import type { control } from '../../proto/messages.js';
import {
  isRunning,
  processIdentity,
  readIdentity,
  signalProcess,
  writeIdentity,
} from '../../snapshotter/process-identity.js';
import type { MountRoot } from './record.js';

/** The descriptor's number in the watcher. */
const CREDENTIALS = 3;
const PROGRAM = fileURLToPath(new URL('../main.js', import.meta.url));

type Credentials = control.RepositoryCredentials.$Properties[];

export interface Watch {
  readonly mountPoint: string;
  /** Becomes readable, with nothing to read, when the data plane has ended. */
  readonly lifeline: number;
  readonly credentials: Credentials;
}

/** Starts it, in place of one there was, and writes it down. */
export async function startWatcher(root: MountRoot, watch: Watch): Promise<void> {
  await endWatcher(root);
  const output = openSync(root.log, 'a', 0o600);
  const memory = createMemoryFile('credentials', Buffer.from(JSON.stringify(watch.credentials)));
  try {
    const command = [process.execPath, PROGRAM, 'reattach', '--wait', watch.mountPoint];
    const child = spawn('sh', ['-c', 'read -r _; exec "$@" </dev/null', 'sh', ...command], {
      // Its own session: it outlives this command, and the terminal.
      stdio: [watch.lifeline, output, output, memory],
      detached: true,
      cwd: '/',
      env: { PATH: process.env['PATH'], EROFS_NBD_MOUNT_RUNTIME: runtimeOf(root) },
    });
    await new Promise<void>((resolve, reject) => {
      child.once('spawn', resolve);
      child.once('error', reject);
    });
    child.unref();
    const identity = child.pid === undefined ? undefined : await processIdentity(child.pid);
    if (identity === undefined) throw new Error('the watcher over the data plane (sh) ended at once');
    await writeIdentity(root.watcher, identity);
  } finally {
    closeSync(output);
    closeSync(memory);
  }
}

function runtimeOf({ directory }: MountRoot): string {
  return directory.slice(0, directory.lastIndexOf('/'));
}

/** Whether somebody would see the end of the data plane. What has become `reattach` sees nothing any more. */
export async function isWatched({ watcher }: MountRoot): Promise<boolean> {
  const identity = await readIdentity(watcher);
  return identity !== undefined && identity.pid !== process.pid && isRunning(identity);
}

/** Ends it, unless it is this process. Idempotent. */
export async function endWatcher({ watcher }: MountRoot): Promise<void> {
  const identity = await readIdentity(watcher);
  if (identity !== undefined && identity.pid !== process.pid) await signalProcess(identity, 'SIGKILL');
  await rm(watcher, { force: true });
}

/** What the watcher holds; nothing when it is gone. */
export async function keptCredentials({ watcher }: MountRoot): Promise<Credentials> {
  const identity = await readIdentity(watcher);
  if (identity === undefined || !(await isRunning(identity))) return [];
  const descriptor = takeDescriptor(identity.pid, CREDENTIALS);
  try {
    return JSON.parse(readMemoryFile(descriptor).toString('utf8')) as Credentials;
  } finally {
    closeSync(descriptor);
  }
}
