/**
 * What runs in the test machine before and after a reboot (test/vm/reboot.ts), on a disk that outlives it.
 *
 *     reboot.js before    pulls an image from a registry, has all of it read, starts containers, and ends with the daemons
 *                         running and a container reading: the machine goes down under them
 *     reboot.js after     no registry: daemons start, the container of before starts again, a new one runs, and every file
 *                         of the image is what it was
 */
import { readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { execa } from 'execa';
import { buildTinyImage, TINY_GREETING } from '../../image/tiny-image.js';
import { patience } from '../../patience.js';
import { startContainerd, type Containerd } from '../../stack/containerd.js';
import { startRegistry } from '../../stack/registry.js';
import { pluginOf, startSnapshotter } from '../../stack/snapshotter.js';
import { originalsIn, verifyRoot } from '../../crash/verify.js';
import { DISK } from '../machine.js';

const NAME = 'tiny:latest';
const SNAPSHOTTER = ['--snapshotter', 'erofs-nbd'];
/** The sums of all files, in the container's own order, in one line. */
const SUMS = 'find / -xdev -type f -exec sha256sum {} + | sort | sha256sum';
const CONFIGURATION = `version = 1
[fetch]
read_deadline = "10s"
[background]
download = false
`;

const say = (message: string): void =>
  console.log(`${(performance.now() / 1000).toFixed(1).padStart(7)} s  ${message}`);

function expectEqual(found: unknown, wanted: unknown, what: string): void {
  if (found !== wanted)
    throw new Error(`${what}: ${JSON.stringify(found)}, expected ${JSON.stringify(wanted)}`);
  say(`ok - ${what}`);
}

const run = async (
  containerd: Containerd,
  reference: string,
  name: string,
  command: string,
): Promise<string> =>
  String((await containerd.ctr('run', '--rm', ...SNAPSHOTTER, reference, name, 'sh', '-c', command)).stdout);

/** How many spans the cache has when no more come: the image was read as a whole. */
async function settledSpans(imageLayout: string): Promise<number> {
  const deadline = Date.now() + patience(30_000);
  for (let last = 0; ; await delay(patience(500))) {
    const { spans } = await verifyRoot(pluginOf(DISK).root, originalsIn([imageLayout]));
    if (spans > 0 && spans === last) return spans;
    if (Date.now() > deadline) throw new Error(`the cache is not at rest: ${spans} spans`);
    last = spans;
  }
}

async function before(): Promise<void> {
  const image = await buildTinyImage({ format: 'erofs' });
  const registry = await startRegistry({ directory: DISK });
  const reference = await registry.push(image, NAME);
  await startSnapshotter({
    directory: DISK,
    configuration: CONFIGURATION,
    logLevel: 'info',
  });
  const containerd = await startContainerd({ directory: DISK, snapshotters: [pluginOf(DISK)] });
  say('daemons run');
  await containerd.ctr('image', 'pull', '--plain-http', ...SNAPSHOTTER, reference);
  const sums = await run(containerd, reference, 'reads-all', SUMS);
  const loop = `while :; do cat /etc/motd > /seen; ${SUMS} > /dev/null; done`;
  await containerd.ctr('run', '-d', ...SNAPSHOTTER, reference, 'witness', 'sh', '-c', loop);
  say(`${await settledSpans(image.layout)} spans are marked as valid`);
  await writeFile(path.join(DISK, 'expected.json'), JSON.stringify({ reference, sums }));
  // As an administrator's reboot does it; daemons and containers are not asked.
  await execa('sync');
  say('the machine goes down while a container reads');
}

async function after(): Promise<void> {
  const { reference, sums } = JSON.parse(await readFile(path.join(DISK, 'expected.json'), 'utf8')) as {
    reference: string;
    sums: string;
  };
  // What is in /run elsewhere does not outlive a reboot.
  await rm(path.join(DISK, 'containerd', 'state'), { recursive: true, force: true });
  const snapshotter = await startSnapshotter({
    directory: DISK,
    configuration: CONFIGURATION,
    logLevel: 'info',
  });
  const containerd = await startContainerd({ directory: DISK, snapshotters: [pluginOf(DISK)] });
  say('daemons run, and no registry does');
  await containerd.ctr('task', 'start', '--detach', 'witness');
  const { stdout } = await containerd.ctr('task', 'exec', '--exec-id', 'a', 'witness', 'cat', '/etc/motd');
  expectEqual(String(stdout), TINY_GREETING.trimEnd(), 'the container of before the reboot runs again');
  const printed = await run(containerd, reference, 'new', 'cat /etc/motd');
  expectEqual(printed, TINY_GREETING.trimEnd(), 'a new container of the cached image runs');
  const again = await run(containerd, reference, 'reads-all-again', SUMS);
  expectEqual(again, sums, 'every file is what it was');
  await containerd.removeAll();
  await containerd.stop();
  await snapshotter.stop();
  await snapshotter.stopServing();
}

const phase = process.argv[2] === 'before' ? before : after;
phase().then(
  () => process.exit(0),
  async (error: unknown) => {
    console.log(`not ok - ${process.argv[2]}: ${error instanceof Error ? error.stack : String(error)}`);
    for (const name of ['erofs-nbd.log', 'containerd.log']) {
      const log = await readFile(path.join(DISK, name), 'utf8').catch(() => '');
      for (const line of log.trimEnd().split('\n').slice(-25)) console.log(line.slice(0, 500));
    }
    process.exit(1);
  },
);
