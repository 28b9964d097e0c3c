/**
 * The private directory everything of a stack lives in: short enough for socket paths, on a file system that takes
 * overlay mounts.
 */
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { markOwned, privateParents } from './abandoned.js';

/** A socket's path is at most 107 bytes; containerd appends to ours. */
const LONGEST = 48;

/**
 * @param prefix first part of the directory's name
 * @returns a new directory for the caller to remove
 * @throws when no candidate takes an overlay mount, with what mount(8) said for each
 */
export async function createPrivateDirectory(prefix: string): Promise<string> {
  const refusals: string[] = [];
  for (const parent of privateParents()) {
    const directory = await mkdtemp(path.join(parent, `${prefix}-`));
    const refusal = directory.length > LONGEST ? 'its path is too long' : await tryOverlay(directory);
    if (refusal === undefined) {
      await markOwned(directory);
      return directory;
    }
    refusals.push(`${parent}: ${refusal}`);
    await rm(directory, { recursive: true, force: true });
  }
  throw new Error(`no directory takes an overlay mount:\n  ${refusals.join('\n  ')}`);
}

/** Mounts an overlay there for a moment; undefined when it worked, else why it did not. */
async function tryOverlay(directory: string): Promise<string | undefined> {
  const trial = path.join(directory, 'trial');
  const [lower, upper, work, merged] = ['lower', 'upper', 'work', 'merged'].map((name) =>
    path.join(trial, name),
  );
  for (const part of [lower, upper, work, merged]) await mkdir(part as string, { recursive: true });
  const options = `lowerdir=${lower},upperdir=${upper},workdir=${work}`;
  const mounted = await execa('mount', ['-t', 'overlay', '-o', options, 'overlay', merged as string], {
    reject: false,
  });
  if (mounted.exitCode === 0) await execa('umount', [merged as string]);
  await rm(trial, { recursive: true, force: true });
  return mounted.exitCode === 0 ? undefined : mounted.stderr.trim() || mounted.message;
}
