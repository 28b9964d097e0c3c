/**
 * A control group for the processes that outlive this one. Where this process is the first of a container, the container's
 * runtime ends all that is in its group when it ends; what serves containers must not be in there then.
 *
 * Source of the interface: Linux, Documentation/admin-guide/cgroup-v2.rst, cgroup.procs.
 */
import { mkdir, open, rmdir } from 'node:fs/promises';
import path from 'node:path';
import type { Logger } from '../daemon/log.js';

/**
 * Puts a process into a control group, which is made when it is not there.
 *
 * @param directory of the group, below where control groups are mounted
 * @throws {Error} naming the group: it cannot be made, is none, or the process cannot be put there
 */
export async function joinControlGroup(directory: string, pid: number): Promise<void> {
  const made = await mkdir(directory, { recursive: true });
  try {
    // Never creating it: where no control groups are mounted, a plain file would look like success.
    const file = await open(path.join(directory, 'cgroup.procs'), 'r+');
    try {
      await file.write(String(pid));
    } finally {
      await file.close();
    }
  } catch (error) {
    if (made !== undefined) await rmdir(directory).catch(() => undefined);
    const code = (error as NodeJS.ErrnoException).code ?? String(error);
    throw new Error(
      code === 'ENOENT'
        ? `${directory} is no control group: nothing is mounted there that has them`
        : `process ${pid} cannot be put into the control group ${directory} (${code})`,
      { cause: error },
    );
  }
}

/** The same where a group is configured; a failure is logged: the process serves all the same, as long as its container runs. */
export async function outliveContainer(
  directory: string,
  pid: number | undefined,
  log: Logger,
): Promise<void> {
  if (directory === '' || pid === undefined) return;
  try {
    await joinControlGroup(directory, pid);
  } catch (error) {
    log.error(
      { err: error },
      'a process that serves layers ends together with the container it was started in',
    );
  }
}
