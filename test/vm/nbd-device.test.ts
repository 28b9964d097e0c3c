import { fileURLToPath } from 'node:url';
import { execa } from 'execa';
import { describe, expect, it } from 'vitest';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));

/** The machine emulates every instruction, on hosts without KVM as on others. */
const LIMIT_MS = 15 * 60 * 1000;

describe('the nbd backend on a Linux 6.12 kernel', () => {
  it(
    'reads right, fails alone, survives kill -9, leaves nothing',
    async () => {
      // A directory of its own: what is built in dist/ at the same time is not disturbed.
      const build = 'dist/vm';
      await execa('node_modules/.bin/tsc', ['-p', 'tsconfig.json', '--outDir', build, '--noCheck'], {
        cwd: ROOT,
      });
      const result = await execa('test/vm/run.sh', ['node', `${build}/test/vm/guest/nbd-device.js`], {
        cwd: ROOT,
        reject: false,
        timeout: LIMIT_MS,
        env: { VM_TIMEOUT: String(LIMIT_MS / 1000 - 60) },
      });
      expect(result.exitCode, `${result.stdout}\n${result.stderr}`).toBe(0);
      expect(result.stdout.match(/^ok - /gm)).toHaveLength(12);
    },
    LIMIT_MS + 60_000,
  );
});
