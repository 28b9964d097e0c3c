/**
 * The windows between two steps: daemons and helpers that die, hang or are stopped in the middle of something.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { cp, mkdir, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { status } from '@grpc/grpc-js';
import { execa } from 'execa';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { FAULT_POINTS_VARIABLE } from '../../daemon/fault-point.js';
import { layout, type Layout } from '../../daemon/layout.js';
import type { CallError } from '../../proto/unary-call.js';
import { isRunning, processIdentity, readIdentity } from '../../snapshotter/process-identity.js';
import { standbyPids } from '../../snapshotter/standby.js';
import { after, hang } from '../fault-server.js';
import { checkout } from '../debian/packages.js';
import { type SmallErofs, smallErofs, withIdentity } from '../image/small-erofs.js';
import { leftovers } from '../stack/leftovers.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter, SnapshotterOptions } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry, type WantedLayer } from './layer-registry.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
type StartOptions = Omit<SnapshotterOptions, 'directory'>;
const CONFIGURATION = `version = 1
[registry]
response_timeout = "5s"
[fetch]
readahead = "0B"
[cache]
span_size = "4KiB"
`;

describe('the data plane', () => {
  let stack: Stack;
  let snapshotter: Snapshotter;
  let client: SnapshotsClient;
  let registry: LayerRegistry;
  let small: SmallErofs;
  let places: Layout;
  let nextIdentity = 1;

  const start = async (options: StartOptions = {}): Promise<void> => {
    client?.close();
    snapshotter = await stack.startSnapshotter({ configuration: CONFIGURATION, ...options });
    client = new SnapshotsClient(snapshotter.plugin.address);
  };

  /** containerd calls Cleanup after every removal: one of them frees what was busy or under way at the one before. */
  const untilFreed = (): Promise<void> =>
    expect
      .poll(
        async () => {
          await client.cleanup().catch(() => undefined);
          return readdir(places.layers);
        },
        { timeout: 100_000, interval: 500 },
      )
      .toEqual([]);

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    registry = await LayerRegistry.start();
    small = await smallErofs(stack.directory, 2 ** 20);
    await start();
    places = layout(snapshotter.plugin.root);
  });
  afterAll(async () => {
    client?.close();
    await registry?.server.close();
    await stack?.remove();
  });
  afterEach(async () => {
    if (missing !== undefined) return;
    registry.server.behaveAgain();
    for (const { name } of (await client.list()).reverse()) await client.remove(name);
    await client.cleanup();
    // An attach that was under way when its snapshotter died ends first, and is taken back then.
    await expect
      .poll(async () => (await snapshotter.devices()) ?? [], { timeout: 100_000, interval: 200 })
      .toEqual([]);
    await untilFreed();
  });

  const test = (name: string, body: () => Promise<void>, needs: 'any' | 'fuse' = 'any'): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      if (needs === 'fuse' && (await servingOver()) !== 'fuse')
        return context.skip('layers come over nbd here');
      await body();
    });

  const newLayer = (): WantedLayer => registry.addLayer(withIdentity(small.image, nextIdentity++));
  const prepare = (layer: WantedLayer): Promise<grpcStatus> =>
    client.prepare(`test/${layer.chainId}`, '', layer.labels).then(
      () => status.OK,
      (error: CallError) => error.code,
    );
  type grpcStatus = status;
  const attach = async (layer: WantedLayer): Promise<string> => {
    expect(await prepare(layer)).toBe(status.ALREADY_EXISTS);
    const find = async () =>
      (await snapshotter.devices())?.find(({ layerDigest }) => layerDigest === layer.digest);
    // A snapshot that is there is answered for at once, while the data plane may be on its way.
    await expect.poll(find, { timeout: 30_000 }).toBeDefined();
    return path.join(places.layers, String((await find())?.layerId), 'fs');
  };
  const servingPid = async (): Promise<number> => (await snapshotter.hello())?.pid ?? 0;
  const servingOver = async (): Promise<'nbd' | 'fuse'> => {
    await attach(newLayer());
    return (await snapshotter.hello())?.fuseMountPoint === '' ? 'nbd' : 'fuse';
  };
  /** A child reads: this process is the registry. */
  const dataOf = async (directory: string): Promise<boolean> => {
    const { stdout } = await execa('cat', [path.join(directory, 'data')], {
      encoding: 'buffer',
      timeout: 60_000,
    });
    return Buffer.from(stdout).equals(small.data);
  };
  const requested = (match: string): Promise<void> =>
    expect.poll(() => registry.server.count(match), { timeout: 60_000 }).toBeGreaterThan(0);

  test('that dies while a layer is looked up or attached is asked again, and nobody notices', async () => {
    await attach(newLayer());
    for (const what of ['/manifests/', '/blobs/']) {
      const layer = newLayer();
      registry.server.requests.length = 0;
      registry.server.fail(what, hang);
      const preparing = prepare(layer);
      await requested(what);
      process.kill(await servingPid(), 'SIGKILL');
      expect(await preparing).toBe(status.ALREADY_EXISTS);
      expect(await dataOf(await attach(layer))).toBe(true);
    }
  });

  test('that dies with the snapshotter just when it has made a device leaves none', async () => {
    const faults = path.join(stack.directory, 'fault-points');
    await mkdir(faults);
    const point = (await servingOver()) === 'nbd' ? 'nbd-connected' : 'fuse-file-added';
    const before = await servingPid();
    await snapshotter.kill();
    process.kill(before, 'SIGKILL');
    await start({ environment: { [FAULT_POINTS_VARIABLE]: faults } });
    await attach(newLayer());
    await writeFile(path.join(faults, point), '');
    const preparing = prepare(newLayer());
    await expect.poll(() => readdir(faults), { timeout: 60_000 }).not.toContain(point);
    await snapshotter.kill();
    await preparing;
    await start();
    for (const { name } of (await client.list()).reverse()) await client.remove(name);
    await untilFreed();
    expect((await leftovers(stack.directory)).nbd).toEqual([]);
  });

  test('that dies while a layer is being mounted serves the mount when it is back', async () => {
    const layer = newLayer();
    registry.server.failAlways('/blobs/', after(30));
    const preparing = prepare(layer);
    for (let killed = 0; killed < 3; killed += 1) {
      await new Promise((resolve) => registry.server.later(150, () => resolve(undefined)));
      process.kill(await servingPid(), 'SIGKILL');
      await expect.poll(servingPid, { timeout: 60_000 }).not.toBe(0);
    }
    expect(await preparing).toBe(status.ALREADY_EXISTS);
    expect(await dataOf(await attach(layer))).toBe(true);
  });

  test(
    'keeps its connection when the keeper was killed: the next snapshotter takes it from the process that serves',
    async () => {
      const directory = await attach(newLayer());
      const before = await servingPid();
      await snapshotter.kill();
      const keeper = await readIdentity(places.fuseKeeper);
      process.kill(keeper?.pid ?? 0, 'SIGKILL');
      await start();
      await attach(newLayer());
      expect(await servingPid()).toBe(before);
      expect(await dataOf(directory)).toBe(true);
      const next = await readIdentity(places.fuseKeeper);
      expect(next).not.toEqual(keeper);
      expect(next !== undefined && (await isRunning(next))).toBe(true);
    },
    'fuse',
  );

  test(
    'that was started and never mounted is replaced',
    async () => {
      await attach(newLayer());
      for (const { name } of await client.list()) await client.remove(name);
      await client.cleanup();
      const before = await servingPid();
      await snapshotter.kill();
      await execa('umount', [places.fuse]);
      await start();
      expect(await dataOf(await attach(newLayer()))).toBe(true);
      expect(await servingPid()).not.toBe(before);
      await expect.poll(async () => readFile(`/proc/${before}/stat`).catch(() => 'gone')).toBe('gone');
    },
    'fuse',
  );

  test('that hangs is replaced, never joined by a second one', async () => {
    const layer = newLayer();
    await attach(layer);
    const before = await servingPid();
    await snapshotter.kill();
    process.kill(before, 'SIGSTOP');
    // So that each process there is one that serves.
    await start({ configuration: `${CONFIGURATION}[recovery]\nstandby = false\n` });
    expect(await dataOf(await attach(layer))).toBe(true);
    expect(await servingPid()).not.toBe(before);
    const { processes } = await leftovers(stack.directory);
    expect(processes.filter((command) => command.includes('programs/blobserve.cjs'))).toHaveLength(1);
  });

  const standing = (): Promise<number[]> => standbyPids(places.controlSocket);
  const untilOneStands = async (): Promise<number> => {
    await expect.poll(standing, { timeout: 60_000, interval: 100 }).toHaveLength(1);
    return (await standing())[0] ?? 0;
  };
  const isGone = async (pid: number): Promise<boolean> => (await processIdentity(pid)) === undefined;

  test('that dies is followed by the one that stands by, and another takes the place of that', async () => {
    await snapshotter.stop();
    await start();
    const seen = await attach(newLayer());
    const next = await untilOneStands();
    const before = await servingPid();
    expect(next).not.toBe(before);
    process.kill(before, 'SIGKILL');
    expect(await dataOf(seen)).toBe(true);
    await expect.poll(servingPid, { timeout: 30_000 }).toBe(next);
    expect(await dataOf(await attach(newLayer()))).toBe(true);
    expect(await untilOneStands()).not.toBe(next);
  });

  test('that dies together with the one that stands by is followed by a new one', async () => {
    const seen = await attach(newLayer());
    const next = await untilOneStands();
    const before = await servingPid();
    for (const pid of [next, before]) process.kill(pid, 'SIGKILL');
    expect(await dataOf(seen)).toBe(true);
    expect([before, next]).not.toContain(await servingPid());
    // The socket of the one that was killed goes with the next one's start.
    await expect.poll(standing, { timeout: 60_000, interval: 100 }).not.toContain(next);
  });

  test('that stands by ends with its snapshotter, however that ends, and leaves nothing', async () => {
    for (const end of [() => snapshotter.kill(), () => snapshotter.stop()]) {
      const seen = await attach(newLayer());
      const next = await untilOneStands();
      const serving = await servingPid();
      await end();
      await expect.poll(() => isGone(next), { timeout: 10_000 }).toBe(true);
      expect(await standing()).toEqual([]);
      expect(await dataOf(seen)).toBe(true);
      await start();
      expect(await servingPid()).toBe(serving);
    }
  });

  test('that hangs under a running snapshotter is replaced by it', async () => {
    const seen = await attach(newLayer());
    await snapshotter.stop();
    await start({ configuration: `${CONFIGURATION}[recovery]\nsilence_timeout = "3s"\n` });
    const before = await servingPid();
    process.kill(before, 'SIGSTOP');
    // Nobody serves it until the process has been replaced.
    expect(await dataOf(seen)).toBe(true);
    expect(await servingPid()).not.toBe(before);
    await snapshotter.stop();
    await start();
  });

  test('gives its devices to a new one when it is asked to, or is of another version, and readers go on', async () => {
    const old = path.join(stack.directory, 'old');
    await mkdir(old);
    for (const name of ['dist', 'package.json'])
      await cp(path.join(checkout, name), path.join(old, name), { recursive: true });
    await symlink(path.join(checkout, 'node_modules'), path.join(old, 'node_modules'));
    const manifest = JSON.parse(await readFile(path.join(old, 'package.json'), 'utf8')) as {
      version: string;
    };
    await writeFile(path.join(old, 'package.json'), JSON.stringify({ ...manifest, version: '0.0.1' }));
    await snapshotter.stop();
    await start({ main: path.join(old, 'dist/snapshotter/main.js') });
    for (const options of [{}, { parameters: ['--handover'] }]) {
      const directory = await attach(newLayer());
      const before = await servingPid();
      await snapshotter.kill();
      // As slow as it takes for reads to be under way all the while.
      registry.server.failAlways('/blobs/', after(300));
      const reading = dataOf(directory);
      await start(options);
      expect(await reading).toBe(true);
      registry.server.behaveAgain();
      const successor = async (): Promise<string | undefined> => {
        const hello = await snapshotter.hello();
        return hello?.pid === before ? 'the old one' : hello?.version;
      };
      await expect.poll(successor).toBe(manifest.version);
      await expect.poll(() => readFile(`/proc/${before}/stat`).catch(() => 'gone')).toBe('gone');
      expect(await dataOf(await attach(newLayer()))).toBe(true);
    }
    await rm(old, { recursive: true });
  });

  test('lets a layer go that was in use when its snapshot was removed, once it is free', async () => {
    const layer = newLayer();
    const directory = await attach(layer);
    const user = spawn('sleep', ['600'], { cwd: directory, stdio: 'ignore' });
    await once(user, 'spawn');
    const [info] = await client.list();
    await client.remove(info?.name ?? '');
    await expect(client.cleanup()).rejects.toMatchObject({ code: status.FAILED_PRECONDITION });
    // It still works for whoever uses it, and can be had again.
    expect(await dataOf(directory)).toBe(true);
    expect(await attach(layer)).toBe(directory);
    expect(await dataOf(directory)).toBe(true);
    const [again] = await client.list();
    await client.remove(again?.name ?? '');
    await expect(client.cleanup()).rejects.toMatchObject({ code: status.FAILED_PRECONDITION });
    // Neither a restart of all makes it forget.
    await snapshotter.kill();
    process.kill(await servingPid(), 'SIGKILL');
    await start();
    expect(await dataOf(directory)).toBe(true);
    user.kill('SIGKILL');
    await once(user, 'exit');
    await untilFreed();
  });

  test('is left in order by a snapshotter stopped, or killed, in the middle of a Prepare', async () => {
    for (const end of ['stop', 'kill'] as const) {
      registry.server.requests.length = 0;
      registry.server.failAlways('/blobs/', hang);
      const preparing = prepare(newLayer());
      await requested('/blobs/');
      await snapshotter[end]();
      expect(await preparing).not.toBe(status.ALREADY_EXISTS);
      registry.server.behaveAgain();
      await start();
      expect(await client.list()).toEqual([]);
      // The attach that was under way ends first.
      await expect.poll(() => snapshotter.devices(), { timeout: 100_000 }).toEqual([]);
      await untilFreed();
    }
  });

  test('leaves alone what somebody else has mounted in the place of a layer, and names it', async () => {
    const directory = await attach(newLayer());
    const [info] = await client.list();
    await snapshotter.stop();
    await execa('umount', [directory]);
    await execa('mount', ['-t', 'tmpfs', 'none', directory]);
    await start();
    const wanted = client.prepare('test/user', info?.name ?? '');
    await expect(wanted).rejects.toMatchObject({ code: status.FAILED_PRECONDITION });
    await expect(wanted).rejects.toThrow(`tmpfs from none is mounted on ${directory} and is not ours`);
    expect((await execa('findmnt', ['-n', '-o', 'FSTYPE', directory])).stdout).toBe('tmpfs');
    await execa('umount', [directory]);
    await client.prepare('test/user', info?.name ?? '');
    expect(await dataOf(directory)).toBe(true);
  });

  test('has what no row speaks of unmounted and removed at the next start', async () => {
    await snapshotter.kill();
    const stray = path.join(places.layers, '4711', 'fs');
    await mkdir(stray, { recursive: true });
    await execa('mount', ['-t', 'tmpfs', 'none', stray]);
    await start();
    await expect.poll(() => readdir(places.layers), { timeout: 60_000 }).toEqual([]);
  });
});
