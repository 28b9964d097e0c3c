/**
 * `npm run test:package -- oci`: the OCI image in a real containerd. The snapshotter runs in a container of the containerd that it
 * serves; containers are started lazily through it, and one reads while the snapshotter's container is killed, removed and started
 * again, alone and with the data plane.
 *
 *   --image FILE    what `npm run package -- --oci` made; default: it is made
 *
 * The last line is one JSON object; the status is 0 when nothing failed.
 */
import { access, readFile, rmdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { execa } from 'execa';
import { probeNbd } from '../../blobserve/attach/nbd-device.js';
import { expectedFiles, sample } from '../crash/expected-files.js';
import { monotonic, Witness } from '../crash/witness.js';
import { checkout } from '../debian/packages.js';
import { buildDebianImage } from '../image/debian-image.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import type { Containerd } from '../stack/containerd.js';
import type { Registry } from '../stack/registry.js';
import { Stack } from '../stack/stack.js';
import { SnapshotterContainer } from './snapshotter-container.js';

const { values } = parseArgs({ options: { image: { type: 'string' } } });

/** Files of the image that the container reads. */
const FILES = 300;

const count = { passed: 0, failed: 0 };

function note(message: string): void {
  console.log(`${(performance.now() / 1000).toFixed(1).padStart(7)} s  ${message}`);
}

async function check(what: string, work: () => Promise<unknown>): Promise<void> {
  try {
    await work();
    count.passed += 1;
    note(`ok      ${what}`);
  } catch (error) {
    count.failed += 1;
    note(`FAILED  ${what}`);
    console.log(`           ${error instanceof Error ? error.message : String(error)}`);
  }
}

function expectSame(what: string, found: unknown, wanted: unknown): void {
  if (found !== wanted)
    throw new Error(`${what}: ${JSON.stringify(found)}, expected ${JSON.stringify(wanted)}`);
}

async function runs(pid: number): Promise<boolean> {
  const said = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => undefined);
  return said !== undefined && !/\) [ZX] /.test(said);
}

async function until(what: string, isSo: () => Promise<boolean>, limit = patience(60_000)): Promise<void> {
  const deadline = Date.now() + limit;
  while (!(await isSo())) {
    if (Date.now() > deadline) throw new Error(`after ${limit} ms it is not so that ${what}`);
    await delay(50);
  }
}

async function image(directory: string): Promise<string> {
  if (values.image !== undefined) return values.image;
  const build = path.join(checkout, 'packaging', 'build.sh');
  const made = await execa('bash', [build, '--oci', directory], { stdin: 'ignore', cwd: checkout });
  return made.stdout.trim().split('\n').at(-1) ?? '';
}

/** What the archive says of the image. */
async function about(archive: string): Promise<{ name: string; entrypoint: string[] }> {
  const file = async (name: string): Promise<unknown> =>
    JSON.parse((await execa('tar', ['-xOf', archive, name])).stdout);
  const blob = (digest: string): Promise<unknown> => file(`blobs/${digest.replace(':', '/')}`);
  const { manifests } = (await file('index.json')) as {
    manifests: { digest: string; annotations: Record<string, string> }[];
  };
  const [descriptor] = manifests;
  const name = descriptor?.annotations['io.containerd.image.name'];
  if (descriptor === undefined || name === undefined) throw new Error(`${archive} names no image`);
  const manifest = (await blob(descriptor.digest)) as { config: { digest: string } };
  const { config } = (await blob(manifest.config.digest)) as { config: { Entrypoint: string[] } };
  return { name, entrypoint: config.Entrypoint };
}

interface Scene {
  readonly containerd: Containerd;
  readonly snapshotter: SnapshotterContainer;
  readonly registry: Registry;
  readonly backend: 'nbd' | 'fuse';
  readonly directory: string;
}

async function checks(scene: Scene): Promise<void> {
  const { containerd, snapshotter, registry, backend } = scene;
  const big = await buildDebianImage({ format: 'erofs' });
  const files = sample(await expectedFiles(big, path.join(scene.directory, 'expected')), FILES);
  const watched = await registry.push(big, 'watched:1');
  const tiny = await registry.push(await buildTinyImage({ format: 'erofs' }), 'tiny:1');
  let containers = 0;
  const newContainer = async (): Promise<void> => {
    const name = `new-${(containers += 1)}`;
    const { stdout } = await containerd.ctr('run', '--rm', '--snapshotter', 'erofs-nbd', tiny, name);
    expectSame('what it printed', `${String(stdout)}\n`, TINY_GREETING);
  };

  await check('the snapshotter of the image answers in a container', () => snapshotter.start(containerd));
  if (count.failed > 0) return;
  await check('images are pulled without their layers', async () => {
    for (const reference of [watched, tiny])
      await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
    const { stdout } = await containerd.ctr('content', 'ls', '--quiet');
    const downloaded = big.layers.filter(({ digest }) => String(stdout).includes(digest));
    expectSame('downloaded layers', downloaded.length, 0);
  });
  await check('a container runs, and prints what is in its image', newContainer);
  await check('its command speaks to it', async () => {
    const said = await snapshotter.command(containerd, 'status', '--json');
    expectSame(said, said.trimStart().startsWith('{'), true);
  });
  const witness = await Witness.start(containerd, watched, path.join(scene.directory, 'record'), files, 2);
  await witness.passed(monotonic());
  note(`a container reads; layers are attached with ${backend}`);
  const allGoesOn = async (): Promise<void> => {
    await witness.passed(monotonic());
    await newContainer();
  };
  await check('layers are mounted on the node', async () => {
    const mounts = await readFile('/proc/self/mountinfo', 'utf8');
    const below = path.join(snapshotter.plugin.root, 'layers');
    const ours = mounts
      .split('\n')
      .filter((line) => line.includes(` ${below}/`) && line.includes(' - erofs '));
    expectSame('any', ours.length > 0, true);
  });
  await check('the data plane is in a control group of its own', async () => {
    for (const pid of [await snapshotter.serving(), await snapshotter.keeper()]) {
      if (pid === undefined) continue;
      const groups = await readFile(`/proc/${pid}/cgroup`, 'utf8');
      expectSame(groups, groups.includes(`/${path.basename(snapshotter.controlGroup)}\n`), true);
    }
  });

  for (const signal of ['SIGKILL', 'SIGTERM'] as const) {
    await check(
      `ended by ${signal}, its container removed: reads go on; started again, it takes over`,
      async () => {
        const serving = await snapshotter.serving();
        await snapshotter.end(containerd, signal);
        expectSame('the data plane runs', await runs(serving), true);
        const before = (await witness.progress()).files;
        await until('more files are read', async () => (await witness.progress()).files > before + 5);
        await snapshotter.start(containerd);
        await allGoesOn();
        await until('the former data plane has ended', async () => !(await runs(serving)));
        expectSame('another one serves', (await snapshotter.serving()) === serving, false);
      },
    );
  }
  await check(
    'its main process and the data plane killed at once, reads wait for the next start',
    async () => {
      const [main, serving] = [await snapshotter.mainPid(containerd), await snapshotter.serving()];
      process.kill(serving, 'SIGKILL');
      process.kill(main, 'SIGKILL');
      await snapshotter.remove(containerd);
      await snapshotter.start(containerd);
      await allGoesOn();
    },
  );
  await check('the data plane killed alone comes back by itself', async () => {
    const serving = await snapshotter.serving();
    process.kill(serving, 'SIGKILL');
    await until('another serves', async () => (await snapshotter.serving()) !== serving);
    await allGoesOn();
  });
  const reading = await witness.stop();
  await check(`the container saw no error in ${reading.files} files`, () => {
    expectSame('errors', reading.errors, 0);
    expectSame('wrong', reading.wrong, 0);
    expectSame('complaints', witness.complaints.join('\n'), '');
    return Promise.resolve();
  });
  const lost =
    backend === 'fuse' ? 'a container that runs loses its files' : 'a container that runs reads on';
  await check(`all of it killed, the keeper too: ${lost}, and new ones run`, async () => {
    await containerd.ctr('run', '-d', '--snapshotter', 'erofs-nbd', tiny, 'bystander', 'sleep', '3600');
    const all = [await snapshotter.serving(), await snapshotter.keeper()];
    for (const pid of [...all, await snapshotter.mainPid(containerd)])
      if (pid !== undefined) process.kill(pid, 'SIGKILL');
    await snapshotter.remove(containerd);
    await snapshotter.start(containerd);
    await newContainer();
    // All of its files: most were not read before.
    const everything = 'find / -xdev -type f -exec cat {} + >/dev/null';
    const look = ['task', 'exec', '--exec-id', 'look', 'bystander', 'sh', '-c', everything];
    const reads = await containerd.ctr(...look).then(
      () => true,
      () => false,
    );
    await containerd.ctr('task', 'kill', '--signal', 'SIGKILL', 'bystander');
    await containerd.ctr('task', 'rm', '--force', 'bystander').catch(() => undefined);
    await containerd.ctr('container', 'rm', 'bystander');
    expectSame('it reads', reads, backend === 'nbd');
  });
  await check('with nothing attached, its end is the end of all', async () => {
    await until('the container has ended', async () => {
      const { stdout } = await containerd.ctr('task', 'ls');
      return /witness\s+\d+\s+STOPPED/.test(String(stdout));
    });
    await containerd.ctr('task', 'rm', '--force', 'witness');
    await containerd.ctr('container', 'rm', 'witness');
    await containerd.ctr('image', 'rm', '--sync', watched, tiny);
    const serving = await snapshotter.serving();
    await snapshotter.end(containerd, 'SIGTERM');
    await until('the data plane has ended', async () => !(await runs(serving)));
    await until('its control group is empty', () =>
      rmdir(snapshotter.controlGroup).then(
        () => true,
        () => false,
      ),
    );
    const mounts = (await readFile('/proc/self/mountinfo', 'utf8')).split('\n');
    const left = mounts.filter((line) => line.includes(` ${snapshotter.plugin.root}/`));
    expectSame('mounts', left.join('\n'), '');
  });
}

async function main(): Promise<boolean> {
  if (process.getuid?.() !== 0) {
    console.log('skipped: not root: containers need it');
    console.log(JSON.stringify({ ok: true, passed: 0, failed: 0, skipped: 1 }));
    return true;
  }
  const stack = await Stack.create('erofs-nbd-oci');
  let containerd: Containerd | undefined;
  try {
    const { directory } = stack;
    const archive = await image(directory);
    await access(archive);
    note(`${path.basename(archive)}: ${((await stat(archive)).size / 1e6).toFixed(1)} MB`);
    const registry = await stack.startRegistry();
    const { name, entrypoint } = await about(archive);
    const snapshotter = await SnapshotterContainer.prepare(directory, name, entrypoint);
    containerd = await stack.startContainerd({ snapshotters: [snapshotter.plugin] });
    await containerd.ctr('image', 'import', '--snapshotter', 'overlayfs', archive);
    note(`containerd ${containerd.version} has ${name}`);
    const backend = (await probeNbd()).available ? 'nbd' : 'fuse';
    await checks({ containerd, snapshotter, registry, backend, directory });
    if (count.failed > 0) console.log((await readFile(snapshotter.log, 'utf8')).slice(-6000));
  } catch (error) {
    count.failed += 1;
    console.log(`FAILED  ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`);
    if (containerd !== undefined) console.log((await readFile(containerd.log, 'utf8')).slice(-6000));
  } finally {
    for (const trouble of await stack.remove()) console.log(trouble);
  }
  console.log(JSON.stringify({ ok: count.failed === 0 && count.passed > 0, ...count }));
  return count.failed === 0 && count.passed > 0;
}

process.exitCode = (await main()) ? 0 : 1;
