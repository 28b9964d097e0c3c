/** The version of the package this process was started from. */
import { readFileSync } from 'node:fs';

function readVersion(): string {
  // Beside the sources (daemon/) in tests, two levels up from dist/daemon/ when compiled.
  for (const candidate of ['../package.json', '../../package.json']) {
    try {
      const text = readFileSync(new URL(candidate, import.meta.url), 'utf8');
      const { version } = JSON.parse(text) as { version?: unknown };
      if (typeof version === 'string') return version;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    }
  }
  throw new Error('package.json of erofs-nbd is not where it belongs; install the package again');
}

export const VERSION: string = readVersion();
