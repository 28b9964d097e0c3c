/**
 * `npm run test:vm -- reboot`: a machine is rebooted while containers read, and comes up without a registry: containers
 * with cached layers start again (guest/reboot.ts).
 */
import { mkdtemp, rm } from 'node:fs/promises';
import path from 'node:path';
import { bootMachine, makeDisk } from './machine.js';

const SIZE = 2 * 2 ** 30;
/** Seconds of one boot. */
const TIMEOUT = 600;

async function main(): Promise<boolean> {
  const directory = await mkdtemp(path.join(process.env['TMPDIR'] ?? '/var/tmp', 'erofs-nbd-reboot-'));
  let [passed, failed] = [0, 0];
  try {
    const disk = path.join(directory, 'disk');
    await makeDisk(disk, SIZE);
    for (const phase of ['before', 'after']) {
      console.log(`== ${phase} the reboot`);
      const { ended } = bootMachine({
        disk,
        program: ['test/vm/guest/reboot.js', phase],
        timeout: TIMEOUT,
        onLine: (line) => {
          if (line.includes(' ok - ')) passed += 1;
          console.log(line);
        },
      });
      const status = await ended;
      if (status === 0) continue;
      console.log(`not ok - the boot ${phase} ended with status ${status}`);
      failed += 1;
      break;
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
  console.log(JSON.stringify({ ok: failed === 0 && passed > 0, passed, failed }));
  return failed === 0 && passed > 0;
}

process.exitCode = (await main()) ? 0 : 1;
