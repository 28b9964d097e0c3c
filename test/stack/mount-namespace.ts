/**
 * This program once more in a mount namespace of its own: nothing that it and its children mount is seen outside, and nothing of
 * it outlives them.
 */
import { spawn } from 'node:child_process';

const INSIDE = 'EROFS_NBD_OWN_MOUNTS';
const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/**
 * Outside, runs this program inside and ends as it does; inside, returns.
 *
 * @throws when there is no unshare(1)
 */
export async function inMountNamespace(): Promise<void> {
  if (process.env[INSIDE] === '1') return;
  const parameters = ['--mount', '--propagation', 'private', process.execPath, ...process.execArgv];
  const child = spawn('unshare', [...parameters, ...process.argv.slice(1)], {
    stdio: 'inherit',
    env: { ...process.env, [INSIDE]: '1' },
  });
  // unshare(1) becomes the program. A terminal's signals reach both; one that was sent to this process alone is passed on.
  for (const name of SIGNALS) process.on(name, () => child.kill(name));
  const status = await new Promise<number>((resolve, reject) => {
    child.once('error', reject);
    child.once('exit', (code) => resolve(code ?? 1));
  });
  process.exit(status);
}
