/**
 * `npm run test:systemd`, and `npm run test:vm -- systemd` with nbd: the Debian package in a Debian where systemd runs. It is
 * installed, restarted, killed, stopped, hung, upgraded while a container reads, refused to be removed while it does, and
 * removed with nothing left. The container compares digests all the while and must see no error.
 *
 *   --suite bookworm       Debian 12, with --with-node; default: trixie, Debian 13
 *   --with-node            the package with a Node.js of its own, where there is no other one
 *   --prepare DIRECTORY    only makes what is needed, and says so in DIRECTORY/prepared.json
 *   --prepared DIRECTORY   takes what was made there: for machines without a network
 *
 * The last line is one JSON object; the status is 0 when nothing failed.
 */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { execa } from 'execa';
import { probeNbd } from '../../blobserve/attach/nbd-device.js';
import { expectedFiles, sample } from '../crash/expected-files.js';
import { monotonic, Witness } from '../crash/witness.js';
import { buildDebianImage } from '../image/debian-image.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import { createPrivateDirectory } from '../stack/private-directory.js';
import { sweep } from '../stack/leftovers.js';
import { startRegistry } from '../stack/registry.js';
import { Daemons, ROOT, UNIT } from './daemons.js';
import { DebianMachine } from './debian-machine.js';
import { NEXT_VERSION, prepare, SUITES, type Flavour, type Prepared } from './prepare.js';

const { values } = parseArgs({
  options: {
    suite: { type: 'string', default: 'trixie' },
    'with-node': { type: 'boolean', default: false },
    prepare: { type: 'string' },
    prepared: { type: 'string' },
  },
});

function flavour(): Flavour {
  const suite = SUITES.find((name) => name === values.suite);
  if (suite === undefined) throw new Error(`--suite ${values.suite}: expected one of ${SUITES.join(', ')}`);
  if (suite === 'bookworm' && !values['with-node'])
    throw new Error('--suite bookworm: its Node.js is too old; add --with-node');
  return { suite, withNode: values['with-node'] };
}

/** Files of the image that the container reads. */
const FILES = 300;
/** Of docs/clients/containerd-1.md, and without what is not used. */
const CONTAINERD = `version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing"]

[proxy_plugins.erofs-nbd]
  type = "snapshot"
  address = "/run/erofs-nbd/snapshotter.sock"
  [proxy_plugins.erofs-nbd.exports]
    root = "${ROOT}"
`;

function note(message: string): void {
  console.log(`${(performance.now() / 1000).toFixed(1).padStart(7)} s  ${message}`);
}

const count = { passed: 0, failed: 0 };

/** One thing that has to be so; the rest is looked at all the same. */
async function check(what: string, work: () => Promise<unknown>): Promise<void> {
  try {
    await work();
    count.passed += 1;
    note(`ok      ${what}`);
  } catch (error) {
    count.failed += 1;
    note(`FAILED  ${what}`);
    console.log(`           ${error instanceof Error ? error.message : String(error)}`);
    console.log(await lastWords());
  }
}

/** What the service logged last, once there is a machine. */
let lastWords = (): Promise<string> => Promise.resolve('');

function expectSame(what: string, found: unknown, wanted: unknown): void {
  if (found !== wanted)
    throw new Error(`${what}: ${JSON.stringify(found)}, expected ${JSON.stringify(wanted)}`);
}

async function prepared(scratch: string): Promise<Prepared> {
  if (values.prepared === undefined) return prepare(scratch, flavour());
  return JSON.parse(await readFile(path.join(values.prepared, 'prepared.json'), 'utf8')) as Prepared;
}

async function test(directory: string): Promise<void> {
  const things = await prepared(directory);
  const backend = (await probeNbd()).available ? 'nbd' : 'fuse';
  note(`packages are made; layers are attached with ${backend}`);
  const home = path.join(directory, 'machine');
  await mkdir(home);
  const registry = await startRegistry({ directory });
  let machine: DebianMachine | undefined;
  try {
    const image = await buildDebianImage({ format: 'erofs' });
    const files = sample(await expectedFiles(image, path.join(directory, 'expected')), FILES);
    const watched = await registry.push(image, 'watched:1');
    const tiny = await registry.push(await buildTinyImage({ format: 'erofs' }), 'tiny:1');
    machine = await DebianMachine.start(things.root, home, { 'etc/containerd/config.toml': CONTAINERD });
    note(`${await machine.run('systemctl', '--version').then((text) => text.split('\n')[0])} is up`);
    for (const file of [things.package, things.nextPackage])
      await execa('cp', [file, path.join(machine.shared, path.basename(file))]);
    const started = machine;
    lastWords = async () =>
      (await started.try('journalctl', '--no-pager', '-o', 'short-monotonic', '-u', UNIT, '-n', '60')).stdout;
    await checks(machine, { ...things, backend, files, watched, tiny });
    if (count.failed > 0) await tellAbout(machine);
  } catch (error) {
    if (machine !== undefined) await tellAbout(machine);
    throw error;
  } finally {
    await machine?.stop();
    await registry.stop();
  }
}

/** What may say why something failed. */
async function tellAbout(machine: DebianMachine): Promise<void> {
  for (const command of [
    ['ps', '-eo', 'pid,ppid,stat,wchan:24,etimes,args'],
    ['erofs-nbd', 'status'],
    ['journalctl', '--no-pager', '-o', 'short-monotonic', '-n', '200'],
  ]) {
    const { stdout, stderr } = await machine.try(...command);
    console.log(`== ${command.join(' ')}\n${stdout}${stderr}`);
  }
}

interface Scene extends Prepared {
  readonly backend: 'nbd' | 'fuse';
  readonly files: ReadonlyMap<string, string>;
  readonly watched: string;
  readonly tiny: string;
}

async function checks(machine: DebianMachine, scene: Scene): Promise<void> {
  const daemons = new Daemons(machine);
  const inShared = (file: string): string => path.join(machine.shared, path.basename(file));
  // Where control groups of version 2 have no controllers, as beside those of version 1, ctr's share of the CPU cannot be set.
  const ctr = (...[first = '', ...rest]: string[]): Promise<string> =>
    machine.run('ctr', first, ...(first === 'run' ? ['--cpu-shares', '0'] : []), ...rest);
  let containers = 0;
  const newContainer = async (): Promise<void> => {
    const name = `new-${(containers += 1)}`;
    const printed = path.join(machine.shared, name);
    const mount = `type=bind,src=${machine.shared},dst=/printed,options=rbind:rw`;
    await ctr(
      ...['run', '--rm', '--snapshotter', 'erofs-nbd', '--mount', mount, scene.tiny, name],
      ...['sh', '-c', `cat /etc/motd > /printed/${name}`],
    );
    expectSame('what it printed', await readFile(printed, 'utf8'), TINY_GREETING);
  };
  const wantStored = scene.backend === 'fuse' ? 1 : 0;
  // Before 254 systemd keeps nothing over a stop: a keeper holds the connection too.
  const version = Number((await machine.run('systemctl', '--version')).split(' ')[1]);
  const wantKeepers = wantStored === 1 && version < 254 ? 1 : 0;

  await check('the package is installed', () => machine.run('dpkg', '-i', inShared(scene.package)));
  await check('the service is enabled, and runs when dpkg is done', async () => {
    expectSame('enabled', (await machine.try('systemctl', 'is-enabled', UNIT)).stdout, 'enabled');
    expectSame('active', await daemons.isActive(), true);
    expectSame('Type', await machine.unit(UNIT, 'Type'), 'notify');
    expectSame(
      'status',
      await machine.unit(UNIT, 'StatusText'),
      'serving on /run/erofs-nbd/snapshotter.sock',
    );
  });
  await check('containerd is ordered after it', async () => {
    const after = await machine.unit('containerd.service', 'After');
    expectSame(after, after.split(' ').includes(UNIT), true);
  });
  await check('containerd restarts with its configuration', () =>
    machine.run('systemctl', 'restart', 'containerd'),
  );
  await check('images are pulled', async () => {
    for (const image of [scene.watched, scene.tiny]) await machine.run('erofs-nbd', 'pull', image);
  });
  await daemons.whole();
  const witness = await Witness.start(
    { ctr },
    scene.watched,
    path.join(machine.shared, 'record'),
    scene.files,
    2,
  );
  await witness.passed(monotonic());
  note('the container reads');
  const allGoesOn = async (): Promise<void> => {
    await daemons.whole();
    await witness.passed(monotonic());
    await newContainer();
  };
  await check('a new container runs', newContainer);
  await check(`systemd holds ${wantStored} descriptors, and a keeper of ours ${wantKeepers}`, async () => {
    await machine.until('it does', async () => (await daemons.stored()) === wantStored);
    const keepers = (await machine.try('pgrep', '-x', 'sleep')).stdout.split('\n').filter(Boolean);
    expectSame('keepers', keepers.length, wantKeepers);
  });

  await check('systemctl restart, three times, leaves the data plane alone', async () => {
    const [before, serving] = [await daemons.mainPid(), await daemons.blobserve()];
    for (let round = 0; round < 3; round += 1) {
      await machine.run('systemctl', 'restart', UNIT);
      await allGoesOn();
    }
    expectSame('the data plane', await daemons.blobserve(), serving);
    expectSame('another snapshotter', (await daemons.mainPid()) === before, false);
    expectSame('descriptors', await daemons.stored(), wantStored);
  });
  await check('both daemons killed at once come back, with the descriptors systemd held', async () => {
    for (let round = 0; round < 3; round += 1) {
      const killed = [await daemons.mainPid(), await daemons.blobserve()];
      await machine.run('kill', '-9', ...killed);
      await machine.until('another snapshotter runs', async () => {
        const pid = await daemons.mainPid();
        return pid !== '0' && pid !== killed[0];
      });
      await allGoesOn();
      expectSame('another data plane', (await daemons.blobserve()) === killed[1], false);
      await machine.until('descriptors are held', async () => (await daemons.stored()) === wantStored);
    }
  });
  await check('a stop leaves the container reading, and a start finds the data plane', async () => {
    const serving = await daemons.blobserve();
    await machine.run('systemctl', 'stop', UNIT);
    expectSame('state', await machine.unit(UNIT, 'ActiveState'), 'inactive');
    expectSame('the data plane runs', await daemons.runs(serving), true);
    const before = (await witness.progress()).files;
    await machine.until('more files are read', async () => (await witness.progress()).files > before + 5);
    await machine.run('systemctl', 'start', UNIT);
    await allGoesOn();
    expectSame('the data plane', await daemons.blobserve(), serving);
  });
  await check('stopped with its data plane killed besides, it comes back by a start', async () => {
    await machine.run('systemctl', 'stop', UNIT);
    await machine.run('kill', '-9', await daemons.blobserve());
    await machine.run('systemctl', 'start', UNIT);
    await allGoesOn();
  });
  await check(
    'a snapshotter that hangs is started again by the watchdog, one that does not is left alone',
    async () => {
      const seconds = Math.round(patience(5));
      const file = path.join(machine.shared, 'watchdog.conf');
      await writeFile(file, `[Service]\nWatchdogSec=${seconds}\n`);
      const override = `/run/systemd/system/${UNIT}.d`;
      await machine.run('install', '-D', file, `${override}/watchdog.conf`);
      await machine.run('systemctl', 'daemon-reload');
      await machine.run('systemctl', 'restart', UNIT);
      await allGoesOn();
      const hung = await daemons.mainPid();
      const since = performance.now();
      await machine.until('twice its time is over', () =>
        Promise.resolve(performance.now() - since > 2000 * seconds),
      );
      expectSame('the snapshotter', await daemons.mainPid(), hung);
      await machine.run('kill', '-STOP', hung);
      await machine.until('another snapshotter runs', async () => {
        const pid = await daemons.mainPid();
        return pid !== '0' && pid !== hung;
      });
      await allGoesOn();
      const journal = await machine.run('journalctl', '--no-pager', '-o', 'cat', '-u', UNIT);
      expectSame('the journal tells of the watchdog', journal.includes('Watchdog timeout'), true);
      await machine.run('rm', '-r', override);
      await machine.run('systemctl', 'daemon-reload');
      await machine.run('systemctl', 'restart', UNIT);
      await allGoesOn();
    },
  );
  await check('containerd restarted, the container goes on', async () => {
    await machine.run('systemctl', 'restart', 'containerd');
    await allGoesOn();
  });
  await check('it is upgraded to a higher version, which takes the devices over', async () => {
    const serving = await daemons.blobserve();
    await machine.run('dpkg', '-i', inShared(scene.nextPackage));
    await allGoesOn();
    expectSame('version', await machine.run('erofs-nbd', '--version'), NEXT_VERSION);
    expectSame('the former data plane runs', await daemons.runs(serving), false);
  });
  await check('it is not removed while a container uses it', async () => {
    const refused = await machine.try('dpkg', '--remove', 'erofs-nbd');
    expectSame('the refusal', refused.exitCode !== 0 && refused.stderr.includes('not removed'), true);
    await allGoesOn();
  });

  const reading = await witness.stop();
  await check(`the container saw no error in ${reading.files} files`, () => {
    expectSame('errors', reading.errors, 0);
    expectSame('wrong', reading.wrong, 0);
    expectSame('complaints', witness.complaints.join('\n'), '');
    return Promise.resolve();
  });
  await check('containers and images are removed', async () => {
    await machine.until(
      'the container has ended',
      async () => !(await ctr('task', 'ls')).includes('RUNNING'),
    );
    await ctr('task', 'rm', '--force', 'witness');
    await ctr('container', 'rm', 'witness');
    const images = (await ctr('image', 'ls', '--quiet')).split('\n').filter(Boolean);
    await ctr('image', 'rm', '--sync', ...images);
  });
  await check('a stop with nothing attached ends the data plane and has systemd hold nothing', async () => {
    const serving = await daemons.blobserve();
    await machine.run('systemctl', 'stop', UNIT);
    expectSame('the data plane runs', await daemons.runs(serving), false);
    await machine.until('nothing is held', async () => (await daemons.stored()) === 0);
    await machine.run('systemctl', 'start', UNIT);
    await daemons.whole();
  });
  await check('it is purged', () => machine.run('dpkg', '--purge', 'erofs-nbd'));
  await check('nothing is left: no process, mount, device, file, unit or descriptor', async () => {
    const found = await machine.run('find', '/', '-xdev', '-path', '*erofs-nbd*', ...NOT_OURS);
    expectSame('files', found, '');
    expectSame(
      'files',
      await machine.run('find', '/run', '/var', '-xdev', '-path', '*erofs-nbd*', ...NOT_OURS),
      '',
    );
    const mounts = (await machine.run('cat', '/proc/self/mountinfo')).split('\n');
    const ours = / (\/var\/lib|\/run)\/erofs-nbd| - (erofs|fuse) /;
    expectSame('mounts', mounts.filter((line) => ours.test(line)).join('\n'), '');
    expectSame('processes', (await machine.try('pgrep', '-af', 'erofs-nbd|blobserve')).stdout, '');
    const backends = await machine.try('sh', '-c', 'grep -l erofs-nbd: /sys/block/nbd*/backend');
    expectSame('devices', backends.stdout, '');
    expectSame('unit', await machine.unit(UNIT, 'LoadState'), 'not-found');
    const failed = await machine.run('systemctl', 'list-units', '--failed', '--plain', '--no-legend');
    expectSame('failed units', failed, '');
  });
}

/** What dpkg and apt keep of every package, the journal, and what is shared with this test. */
const NOT_OURS = ['/var/log', '/var/cache', '/var/lib/dpkg', '/before', '/var/tmp', '/run/w'].flatMap(
  (name) => ['!', '-path', `${name}/*`],
);

async function main(): Promise<boolean> {
  if (process.getuid?.() !== 0) {
    console.log('skipped: not root: namespaces and mounts need it');
    console.log(JSON.stringify({ ok: true, passed: 0, failed: 0, skipped: 1 }));
    return true;
  }
  if (values.prepare !== undefined) {
    const made = await prepare(values.prepare, flavour());
    await writeFile(path.join(values.prepare, 'prepared.json'), JSON.stringify(made));
    return true;
  }
  const directory = await createPrivateDirectory('erofs-nbd-systemd');
  try {
    await test(directory);
  } catch (error) {
    count.failed += 1;
    console.log(`FAILED  ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`);
  } finally {
    await sweep(directory);
  }
  console.log(JSON.stringify({ ok: count.failed === 0 && count.passed > 0, ...count }));
  return count.failed === 0 && count.passed > 0;
}

process.exitCode = (await main()) ? 0 : 1;
