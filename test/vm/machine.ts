/**
 * The test machine (run.sh) with a disk that outlives it: booted again and again, ended by a power cut.
 */
import { spawn } from 'node:child_process';
import { readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { execa } from 'execa';
import { checkout } from '../debian/packages.js';

/** Where the disk is mounted in the machine. */
export const DISK = '/run/w';
const SCRIPT = path.join(checkout, 'test', 'vm', 'run.sh');

/** A new disk with an ordinary file system: with a journal, its data in no journal. @param size bytes */
export async function makeDisk(file: string, size: number): Promise<void> {
  await execa('truncate', ['--size', String(size), file]);
  await execa('mkfs.ext4', ['-q', '-F', file], { stdin: 'ignore' });
}

export interface MachineOptions {
  /** The disk, mounted at {@link DISK} before the program begins. */
  readonly disk: string;
  /** A compiled program below dist/, and its arguments. */
  readonly program: readonly string[];
  /** Run by the shell before the program. */
  readonly prepare?: string;
  /** Every line that the program prints. */
  readonly onLine: (line: string) => void;
  /** Seconds. */
  readonly timeout: number;
  /** `2G` */
  readonly memory?: string;
}

export interface Machine {
  /** Cuts the power: QEMU gets SIGKILL. */
  cut(): Promise<void>;
  /** The program's status; 137 when the power was cut, 124 when it took too long, 125 when the machine died by itself. */
  readonly ended: Promise<number>;
}

export function bootMachine(options: MachineOptions): Machine {
  const pidFile = `${options.disk}.pid`;
  const [program = '', ...parameters] = options.program;
  const commands = [
    `mkdir -p ${DISK} && mount /dev/vda ${DISK} || exit 1`,
    options.prepare ?? ':',
    'exec node --enable-source-maps "$@"',
  ];
  const child = spawn(
    SCRIPT,
    ['bash', '-c', commands.join('\n'), 'bash', path.join(checkout, 'dist', program), ...parameters],
    {
      cwd: checkout,
      stdio: ['ignore', 'pipe', 'inherit'],
      env: {
        ...process.env,
        VM_DISK: options.disk,
        VM_PIDFILE: pidFile,
        VM_MODULES: 'overlay erofs nbd loop ext4',
        VM_TIMEOUT: String(options.timeout),
        VM_MEMORY: options.memory ?? '2G',
        // Factor for what tests wait for in there.
        EROFS_NBD_SLOW: process.env['EROFS_NBD_SLOW'] ?? '6',
        EROFS_NBD_EXPECT_ATTACH: 'nbd',
      },
    },
  );
  const lines = createInterface({ input: child.stdout });
  lines.on('line', options.onLine);
  const ended = new Promise<number>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (code) => resolve(code ?? 125));
  }).finally(() => rm(pidFile, { force: true }));
  return {
    cut: async () => {
      process.kill(Number(await readFile(pidFile, 'utf8')), 'SIGKILL');
    },
    ended,
  };
}
