/**
 * A Debian with a systemd that runs as its first process, in namespaces of this machine: processes, mounts, host name and
 * control groups are its own; the network and the kernel are this machine's.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { cp, mkdir, readdir, readFile, rmdir, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { execa } from 'execa';
import { checkout } from '../debian/packages.js';
import { patience } from '../patience.js';

/** Of no use here. */
const MASKED = [
  ...['getty.target', 'console-getty.service', 'systemd-logind.service', 'apt-daily.timer'],
  ...['apt-daily-upgrade.timer', 'dpkg-db-backup.timer', 'e2scrub_all.timer', 'fstrim.timer'],
  'systemd-networkd.service',
];

export class DebianMachine {
  private constructor(
    /** On a file system that takes overlay mounts. */
    private readonly directory: string,
    private readonly cgroup: string,
    private readonly child: ChildProcess,
    /** Of its first process, as this machine sees it. */
    readonly pid: number,
  ) {}

  /** A directory that it sees under the same path. */
  get shared(): string {
    return path.join(this.directory, 'shared');
  }

  /**
   * @param root of a Debian; it is not written to
   * @param directory an existing one
   * @param files to write into it before it starts, by absolute path
   */
  static async start(
    root: string,
    directory: string,
    files: Readonly<Record<string, string>>,
  ): Promise<DebianMachine> {
    for (const name of ['upper', 'work', 'root', 'shared']) await mkdir(path.join(directory, name));
    // Not of the overlay: on one, no overlay can be mounted.
    await cp(path.join(root, 'var'), path.join(directory, 'var'), {
      recursive: true,
      verbatimSymlinks: true,
    });
    for (const [name, text] of Object.entries(files)) {
      const file = path.join(directory, 'upper', name);
      await mkdir(path.dirname(file), { recursive: true });
      await writeFile(file, text);
    }
    const units = path.join(directory, 'upper/etc/systemd/system');
    await mkdir(units, { recursive: true });
    for (const name of MASKED) await symlink('/dev/null', path.join(units, name));

    const cgroup = path.join(await cgroup2(), path.basename(directory));
    await mkdir(cgroup);
    const log = openSync(path.join(directory, 'systemd.log'), 'a');
    const script = path.join(checkout, 'test/systemd/start.sh');
    const child = spawn('bash', [script, root, directory, cgroup], {
      ...{ detached: true, stdio: ['ignore', log, log] },
    });
    closeSync(log);
    const pid = await firstProcess(child);
    const machine = new DebianMachine(directory, cgroup, child, pid);
    await machine.until('systemd is up', async () => {
      const { stdout } = await machine.try('systemctl', 'is-system-running');
      return stdout === 'running' || stdout === 'degraded';
    });
    return machine;
  }

  /** Runs a command in it. @throws with what it printed when it fails */
  async run(...command: string[]): Promise<string> {
    const { exitCode, stdout, stderr } = await this.try(...command);
    if (exitCode === 0) return stdout;
    throw new Error(
      `${command.join(' ')}: status ${exitCode}: ${`${stderr}\n${stdout}`.trim().slice(-1500)}`,
    );
  }

  /** Runs a command in it, which may fail. */
  async try(...command: string[]): Promise<{ exitCode: number | undefined; stdout: string; stderr: string }> {
    const namespaces = ['--mount', '--pid', '--uts', '--ipc', '--cgroup', '--root', '--wd'];
    const PATH = '/usr/sbin:/usr/bin:/sbin:/bin';
    const ended = await execa('nsenter', ['--target', String(this.pid), ...namespaces, ...command], {
      ...{ reject: false, stdin: 'ignore', extendEnv: false, timeout: patience(120_000) },
      env: { PATH, DEBIAN_FRONTEND: 'noninteractive', LC_ALL: 'C.UTF-8' },
    });
    return { exitCode: ended.exitCode, stdout: ended.stdout, stderr: ended.stderr };
  }

  /** Asks until it is so. @throws when that takes too long */
  async until(what: string, isSo: () => Promise<boolean>, limit = patience(60_000)): Promise<void> {
    const deadline = Date.now() + limit;
    while (!(await isSo())) {
      if (Date.now() > deadline) throw new Error(`after ${limit} ms it is not so that ${what}`);
      await delay(patience(50));
    }
  }

  /** What systemd says of a unit. */
  async unit(name: string, property: string): Promise<string> {
    return this.run('systemctl', 'show', '--value', '--property', property, name);
  }

  /** Ends it with all that runs in it. */
  async stop(): Promise<void> {
    const ended = new Promise((resolve) => this.child.once('exit', resolve));
    if (this.child.exitCode === null && this.child.signalCode === null) {
      process.kill(this.pid, 'SIGKILL');
      await ended;
    }
    await removeCgroup(this.cgroup);
  }
}

/** Where the control groups of version 2 are. */
async function cgroup2(): Promise<string> {
  for (const line of (await readFile('/proc/self/mountinfo', 'utf8')).split('\n')) {
    const [before = '', after = ''] = line.split(' - ');
    if (after.startsWith('cgroup2 ')) return before.split(' ')[4] ?? '';
  }
  throw new Error('no control groups of version 2 are mounted');
}

async function removeCgroup(directory: string): Promise<void> {
  for (const entry of await readdir(directory, { withFileTypes: true }).catch(() => []))
    if (entry.isDirectory()) await removeCgroup(path.join(directory, entry.name));
  // Busy for a moment after its last process has ended.
  for (let left = 100; left > 0; left -= 1) {
    try {
      return await rmdir(directory);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EBUSY') return;
      await delay(20);
    }
  }
}

/** The process that `unshare` made in the new namespace of processes. */
async function firstProcess(child: ChildProcess): Promise<number> {
  const deadline = Date.now() + patience(30_000);
  for (;;) {
    if (child.exitCode !== null) throw new Error(`the machine ended with status ${child.exitCode}`);
    if (Date.now() > deadline) throw new Error('the machine does not start');
    const file = `/proc/${child.pid}/task/${child.pid}/children`;
    const first = Number((await readFile(file, 'utf8').catch(() => '')).split(' ')[0]);
    // Until then it is the shell that makes ready what systemd finds.
    const name = first > 0 ? await readFile(`/proc/${first}/comm`, 'utf8').catch(() => '') : '';
    if (name === 'systemd\n') return first;
    await delay(20);
  }
}
