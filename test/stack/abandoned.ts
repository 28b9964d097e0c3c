/**
 * Stacks whose owner was killed before it could clean up.
 */
import { readdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { sweep } from './leftovers.js';

const OWNER = 'owner';

/** Parents of private directories, the preferred first. */
export function privateParents(): readonly string[] {
  const chosen = process.env['EROFS_NBD_TEST_ROOT'];
  return chosen ? [chosen] : ['/var/tmp', '/tmp', '/run', '/dev/shm'];
}

/** `pid start-time`: the pid alone may be another process's by the time it is looked at. Undefined when it has ended. */
async function identify(pid: number): Promise<string | undefined> {
  const status = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => undefined);
  // Field 22, counted from behind the command's name, which may hold spaces.
  const started = status?.slice(status.lastIndexOf(')') + 2).split(' ')[19];
  return started === undefined ? undefined : `${pid} ${started}`;
}

/** Notes in the directory that it is this process's. */
export async function markOwned(directory: string): Promise<void> {
  await writeFile(path.join(directory, OWNER), (await identify(process.pid)) ?? '');
}

/** Clears away every stack of that prefix whose owner is gone. */
export async function removeAbandonedStacks(prefix: string): Promise<void> {
  for (const parent of privateParents()) {
    const names = await readdir(parent).catch(() => []);
    for (const name of names.filter((entry) => entry.startsWith(`${prefix}-`))) {
      const directory = path.join(parent, name);
      const owner = await readFile(path.join(directory, OWNER), 'utf8').catch(() => undefined);
      // Without a note it is none of ours, or is being made at this moment.
      if (owner === undefined) continue;
      if ((await identify(Number.parseInt(owner))) !== owner) await sweep(directory);
    }
  }
}
