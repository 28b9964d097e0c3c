/**
 * Making a FUSE connection and mounting it, apart from serving it: the process that holds the connection open and the
 * one that serves it may be two, and the first must outlive the second.
 *
 *     const descriptor = openFuse();         // supervisor; hand it to the server as an inherited descriptor
 *     new FuseServer(descriptor, …);         // serving process; before or after mounting
 *     await mountFuse(descriptor, directory) // any process but the serving one
 *
 * mount(8) and umount(8) run as child processes with a time limit: newer ones look at the new mount, which waits for the
 * server. Nothing here is ever forced or lazy.
 */
import { spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { access, readFile } from 'node:fs/promises';
import { release } from 'node:os';
import { AttachError } from './backend.js';
import { FUSE_MAX_READ } from './fuse-server.js';

const FUSE_DEVICE = '/dev/fuse';
const DEFAULT_TIMEOUT_MS = 10_000;
/** The first kernel on which EROFS mounts a file without a block device in between. */
const FILE_BACKED_EROFS = { major: 6, minor: 12 };
/** Enough of what a failed command says. */
const MAX_STDERR_LENGTH = 2000;

/**
 * Opens a new FUSE connection, not mounted yet. Closed on exec, and non-blocking once it is served. As long as any
 * process holds it open, what is mounted on it lives.
 *
 * @throws {AttachError} when /dev/fuse cannot be opened
 */
export function openFuse(): number {
  try {
    return openSync(FUSE_DEVICE, 'r+');
  } catch (error) {
    throw new AttachError(`cannot open ${FUSE_DEVICE} for reading and writing: ${messageOf(error)}`, {
      cause: error,
    });
  }
}

/**
 * Mounts a connection on a directory, readable by root alone. The server may start before or after; an mount(8) from
 * util-linux 2.39 on returns only when it answers.
 *
 * @param descriptor from `openFuse`, in this process
 * @throws {AttachError} with what mount(8) said
 */
export async function mountFuse(
  descriptor: number,
  directory: string,
  timeoutMs = DEFAULT_TIMEOUT_MS,
): Promise<void> {
  const options = [
    'fd=3',
    'rootmode=40000',
    'user_id=0',
    'group_id=0',
    'allow_other',
    'default_permissions',
    `max_read=${FUSE_MAX_READ}`,
    'ro',
    'nosuid',
    'nodev',
    'noexec',
  ];
  // -i: no mount.fuse helper, which would want to start a server itself.
  const args = ['-i', '-t', 'fuse', '-o', options.join(','), 'erofs-nbd', directory];
  await run('mount', args, descriptor, timeoutMs, `cannot mount the FUSE file system on ${directory}`);
}

/**
 * Unmounts it; nothing may be mounted on its files any more.
 *
 * @throws {AttachError} with what umount(8) said, "target is busy" while something uses it
 */
export async function unmountFuse(directory: string, timeoutMs = DEFAULT_TIMEOUT_MS): Promise<void> {
  // -i: no helper; --no-canonicalize: no look at what may wait for its server.
  const args = ['-i', '--no-canonicalize', directory];
  await run('umount', args, undefined, timeoutMs, `cannot unmount the FUSE file system on ${directory}`);
}

export type FuseProbe =
  | { readonly available: true }
  | {
      readonly available: false;
      /** What is missing, and what to do about it where something can be done. */
      readonly reason: string;
    };

/** Whether layers can be attached through FUSE on this machine: the device, the kernel, EROFS. Changes nothing. */
export async function probeFuse(): Promise<FuseProbe> {
  const kernel = release();
  const [major = 0, minor = 0] = kernel.split('.').map((part) => parseInt(part, 10));
  if (
    major < FILE_BACKED_EROFS.major ||
    (major === FILE_BACKED_EROFS.major && minor < FILE_BACKED_EROFS.minor)
  ) {
    return {
      available: false,
      reason: `Linux ${kernel} cannot mount EROFS on a file; ${FILE_BACKED_EROFS.major}.${FILE_BACKED_EROFS.minor} is the first that can`,
    };
  }
  try {
    closeSync(openFuse());
  } catch (error) {
    return { available: false, reason: `${messageOf(error)}; load the module with "modprobe fuse", as root` };
  }
  const filesystems = await readFile('/proc/filesystems', 'utf8');
  if (!/^\s*(nodev)?\s*erofs$/m.test(filesystems) && !(await hasErofsModule(kernel))) {
    return {
      available: false,
      reason: `Linux ${kernel} has no EROFS: neither built in nor as a module in /lib/modules`,
    };
  }
  return { available: true };
}

/** The kernel loads the module by itself when something is mounted. */
async function hasErofsModule(kernel: string): Promise<boolean> {
  try {
    await access(`/lib/modules/${kernel}`);
    const modules = await readFile(`/lib/modules/${kernel}/modules.dep`, 'utf8');
    return /\/erofs\.ko(\.[a-z0-9]+)?:/.test(modules);
  } catch (error) {
    // No modules at all, or none that is listed.
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw error;
  }
}

function run(
  command: string,
  args: readonly string[],
  inherited: number | undefined,
  timeoutMs: number,
  failure: string,
): Promise<void> {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, {
      stdio: ['ignore', 'ignore', 'pipe', inherited ?? 'ignore'],
      cwd: '/',
      env: { ...process.env, LC_ALL: 'C' },
    });
    let said = '';
    child.stderr?.on('data', (chunk: Buffer) => {
      if (said.length < MAX_STDERR_LENGTH) said += chunk.toString('utf8');
    });
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      child.kill('SIGKILL');
      // It may be stuck in the kernel, and end when the server answers.
      child.unref();
      reject(new AttachError(`${failure}: ${command} took longer than ${timeoutMs} ms`));
    }, timeoutMs);
    child.once('error', (error) => {
      clearTimeout(timer);
      reject(new AttachError(`${failure}: ${error.message}`, { cause: error }));
    });
    child.once('close', (code, signal) => {
      clearTimeout(timer);
      if (late) return;
      if (code === 0) resolve();
      else reject(new AttachError(`${failure}: ${said.trim() || `${command} ended with ${signal ?? code}`}`));
    });
  });
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
