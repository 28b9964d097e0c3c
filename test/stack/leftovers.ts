/**
 * What a stack has left on this machine, and taking it away: mounts, loop and nbd devices, processes, cgroups, files.
 * All of it is recognised by the private directory's path or by the namespace named after it.
 */
import { readdir, readFile, readlink, rm, rmdir } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { execa } from 'execa';
import { patience } from '../patience.js';

export interface Leftovers {
  /** Mount points below the directory, the last mounted first. */
  readonly mounts: readonly string[];
  /** Loop devices on files below the directory. */
  readonly loops: readonly string[];
  /** nbd devices that carry our identifier, of whichever directory: the kernel does not say. */
  readonly nbd: readonly string[];
  /** `pid command` of processes that were started with the directory in their arguments, or run in our cgroups. */
  readonly processes: readonly string[];
  readonly cgroups: readonly string[];
  /** How many files and directories are left. */
  readonly files: number;
}

/** True when nothing at all is left. */
export function isClean(left: Leftovers): boolean {
  const { mounts, loops, nbd, processes, cgroups, files } = left;
  return mounts.length + loops.length + nbd.length + processes.length + cgroups.length + files === 0;
}

/** @param directory a stack's private directory, which may be gone already */
export async function leftovers(directory: string): Promise<Leftovers> {
  const processes = await findProcesses(directory);
  const entries = await readdir(directory, { recursive: true }).catch(() => undefined);
  return {
    mounts: await findMounts(directory),
    loops: await findLoops(directory),
    nbd: await findNbd(),
    processes: processes.map(({ pid, command }) => `${pid} ${command}`),
    cgroups: await findCgroups(path.basename(directory)),
    files: entries === undefined ? 0 : entries.length + 1,
  };
}

/**
 * Takes away whatever is left, by force, and removes the directory: after an orderly stop there is nothing to do but
 * the latter, after a failure there may be.
 */
export async function sweep(directory: string): Promise<void> {
  await killProcesses(directory);
  await unmountBelow(directory);
  for (const device of await findLoops(directory)) await execa('losetup', ['-d', device], { reject: false });
  const namespace = path.basename(directory);
  for (const cgroup of await findCgroups(namespace)) await rmdir(cgroup).catch(() => undefined);
  await rm(path.join('/run/containerd/runc', namespace), { recursive: true, force: true });
  const mounts = await findMounts(directory);
  if (mounts.length > 0) {
    throw new Error(`${directory} is kept: still mounted in it, and they may be busy: ${mounts.join(', ')}`);
  }
  await rm(directory, { recursive: true, force: true });
}

/** Unmounts everything at or below a directory, the last mounted first. */
export async function unmountBelow(directory: string): Promise<void> {
  for (const mount of await findMounts(directory)) {
    const ended = await execa('umount', [mount], { reject: false, timeout: patience(20_000) });
    // Busy, or its server is dead: out of sight at once, gone when the last user is.
    if (ended.exitCode !== 0)
      await execa('umount', ['--lazy', mount], { reject: false, timeout: patience(20_000) });
  }
}

async function killProcesses(directory: string): Promise<void> {
  const found = await findProcesses(directory);
  for (const { pid } of found) signal(pid, 'SIGKILL');
  const deadline = Date.now() + patience(10_000);
  while ((await findProcesses(directory)).length > 0 && Date.now() < deadline) await delay(20);
}

function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch (error) {
    // It has ended meanwhile.
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

async function findMounts(directory: string): Promise<string[]> {
  const table = await readFile('/proc/self/mountinfo', 'utf8');
  return table
    .trimEnd()
    .split('\n')
    .map((line) => unescapePath(line.split(' ')[4] ?? ''))
    .filter((point) => point === directory || point.startsWith(`${directory}/`))
    .reverse();
}

/** proc_pid_mountinfo(5): space, tab, newline and backslash are written as three octal digits. */
function unescapePath(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) =>
    String.fromCharCode(Number.parseInt(digits, 8)),
  );
}

async function findLoops(directory: string): Promise<string[]> {
  const found: string[] = [];
  for (const device of (await readdir('/sys/block')).filter((name) => name.startsWith('loop'))) {
    // Only a loop device in use has this file.
    const file = await readFile(`/sys/block/${device}/loop/backing_file`, 'utf8').catch(() => '');
    if (file.startsWith(`${directory}/`)) found.push(`/dev/${device}`);
  }
  return found;
}

async function findNbd(): Promise<string[]> {
  const found: string[] = [];
  for (const device of (await readdir('/sys/block')).filter((name) => name.startsWith('nbd'))) {
    const identifier = await readFile(`/sys/block/${device}/backend`, 'utf8').catch(() => '');
    if (identifier.startsWith('erofs-nbd:')) found.push(`/dev/${device}`);
  }
  return found;
}

interface ProcessFound {
  readonly pid: number;
  readonly command: string;
}

async function findProcesses(directory: string): Promise<ProcessFound[]> {
  const found: ProcessFound[] = [];
  for (const name of (await readdir('/proc')).filter((entry) => /^\d+$/.test(entry))) {
    if (Number(name) === process.pid) continue;
    // A process may end between two of these reads; then there is nothing to tell of it.
    // Not `stat`: reading that hangs for as long as some other process of this machine hangs in execve.
    const status = await readFile(`/proc/${name}/status`, 'utf8').catch(() => '');
    const state = /^State:\s+(\S)/m.exec(status)?.[1] ?? '';
    // One that has ended and waits for its parent to notice holds nothing any more.
    if (state === '' || state === 'Z' || state === 'X') continue;
    const cgroup = await readFile(`/proc/${name}/cgroup`, 'utf8').catch(() => '');
    // The arguments lie in the process's memory: reading them waits with a process that waits for a mount that hangs.
    const words =
      state === 'D' ? [] : (await readFile(`/proc/${name}/cmdline`, 'utf8').catch(() => '')).split('\0');
    // The keeper of a FUSE connection is a plain `sleep`: its environment says whose.
    const environment =
      words[0] === 'sleep'
        ? (await readFile(`/proc/${name}/environ`, 'utf8').catch(() => '')).split('\0')
        : [];
    const below = [...words, ...environment].some(
      (word) => word.includes(`${directory}/`) || word === directory,
    );
    if (!below && !cgroup.includes(`/${path.basename(directory)}/`)) continue;
    const executable = await readlink(`/proc/${name}/exe`).catch(() => '');
    found.push({ pid: Number(name), command: words.join(' ').trim() || executable });
  }
  return found;
}

async function findCgroups(namespace: string): Promise<string[]> {
  const root = '/sys/fs/cgroup';
  // Version 2 has one hierarchy there, version 1 one per controller below.
  const hierarchies = [root, ...(await readdir(root).catch(() => [])).map((name) => path.join(root, name))];
  const found: string[] = [];
  for (const hierarchy of hierarchies) {
    const ours = path.join(hierarchy, namespace);
    const children = await readdir(ours, { withFileTypes: true }).catch(() => undefined);
    if (children === undefined) continue;
    // The deepest first, as they have to be removed.
    for (const child of children) if (child.isDirectory()) found.push(path.join(ours, child.name));
    found.push(ours);
  }
  return found;
}
