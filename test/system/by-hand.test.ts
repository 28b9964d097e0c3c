/**
 * `erofs-nbd mount` and what belongs to it, on the kernel's devices and against the trees the images were made of.
 */
import { createServer, type OutgoingHttpHeaders, request, type Server } from 'node:http';
import { once } from 'node:events';
import { mkdir, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ListedMount } from '../../cli/mount/listing.js';
import type { MountRecord } from '../../cli/mount/record.js';
import { probeNbd } from '../../blobserve/attach/nbd-device.js';
import { COMMAND, type CommandResult, erofsNbd, NOBODY, nobodyCannot } from '../command/run-command.js';
import { mountErofs } from '../debian/mount-erofs.js';
import { fetchErofsUtils, referenceGzipIndex, referenceTarIndex } from '../erofs-utils.js';
import { withErofsMount } from '../erofs-mount.js';
import { blobPath } from '../image/layer-blob.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, flattenLayers, writeTinyLayers } from '../image/tiny-image.js';
import { mountAt } from '../../snapshotter/mount-table.js';
import { patience } from '../patience.js';
import { leftovers } from '../stack/leftovers.js';
import type { Registry } from '../stack/registry.js';
import { Stack } from '../stack/stack.js';
import { readTree } from '../tree.js';
import { compareMountedTree } from '../trees/compare.js';
import { writeTree } from '../trees/tree-file.js';
import { brief, expectedBackend, missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

const PASSWORD = 'a-password-that-is-nowhere';

describe('mounting by hand', () => {
  let stack: Stack;
  let registry: Registry;
  const images: Record<'erofs' | 'tar' | 'tar+gzip', { image: Image; reference: string }> = {} as never;
  let target: string;
  let kept: string[];
  const at = (name: string): string => path.join(stack.directory, name);
  const treeOf = (name: string | number): string => at(`tree-${name}.jsonl`);

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    registry = await stack.startRegistry();
    for (const format of ['erofs', 'tar', 'tar+gzip'] as const) {
      const image = await buildTinyImage({ format });
      images[format] = { image, reference: await registry.push(image, `${format.replace('+', '-')}:1`) };
    }
    target = at('mnt');
    await mkdir(target);
    kept = ['--runtime', at('runtime'), '--cache', at('kept')];
    // What the whole image has to look like, and each of its layers.
    await flattenLayers(await writeTinyLayers(at('layers')), at('flat'));
    await writeTree(treeOf('whole'), readTree(at('flat')));
    fetchErofsUtils();
    const { layers, layout } = images.tar.image;
    for (const [number, { digest }] of layers.entries()) {
      const [tar, tarindex] = [blobPath(layout, digest), at(`reference-${number}.erofs`)];
      referenceTarIndex(tar, tarindex);
      await writeTree(treeOf(number), withErofsMount(tarindex, readTree, `device=${tar}`));
    }
  }, patience(600_000));

  afterAll(async () => {
    expect(await stack?.remove()).toEqual(missing === undefined ? [] : undefined);
  });

  const test = (
    name: string,
    body: () => Promise<void>,
    needs: () => Promise<string | undefined> = () => Promise.resolve(undefined),
  ): void =>
    it(name, async (context) => {
      const reason = missing ?? (await needs());
      if (reason !== undefined) return context.skip(reason);
      try {
        await body();
      } finally {
        await run('umount', target);
      }
    });

  /** Has nothing to do with how devices reach the kernel. */
  const elsewhere: typeof test = brief ? () => undefined : test;

  const run = (command: string, ...words: string[]): Promise<CommandResult> =>
    erofsNbd([command, ...kept.slice(0, 2), ...words], { timeout: patience(120_000) });

  const mount = (source: string, ...options: string[]): Promise<CommandResult> =>
    erofsNbd(['mount', ...kept, '--json', ...options.flatMap((one) => ['-o', one]), source, target], {
      timeout: patience(120_000),
    });

  async function mounted(source: string, ...options: string[]): Promise<MountRecord> {
    const { exitCode, stdout, stderr } = await mount(source, ...options);
    expect({ exitCode, stderr }).toEqual({ exitCode: 0, stderr: '' });
    return JSON.parse(stdout) as MountRecord;
  }

  const listed = async (): Promise<ListedMount[]> => {
    const { stdout } = await run('list', '--json');
    return (JSON.parse(stdout) as { mounts: ListedMount[] }).mounts;
  };

  const same = async (tree: string | number): Promise<void> => {
    const { differences } = await compareMountedTree(target, [treeOf(tree)], ['nlink', 'mtimeNs']);
    expect(differences).toEqual({ [`tree-${tree}.jsonl`]: [] });
  };

  const unmounted = async (): Promise<void> => {
    expect(await run('umount', target)).toEqual({ exitCode: 0, stdout: '', stderr: '' });
    await nothingLeft();
  };

  /** But the registry, whose processes and files are the stack's. */
  const nothingLeft = async (): Promise<void> => {
    const left = await leftovers(stack.directory);
    expect([left.mounts, left.nbd]).toEqual([[], []]);
    expect(left.processes.filter((line) => !line.includes('docker-registry'))).toEqual([]);
    expect(await readdir(at('runtime')).catch(() => [])).toEqual([]);
  };

  for (const format of ['erofs', 'tar+gzip'] as const) {
    test(`shows a whole image of ${format} layers as its layers make it`, async () => {
      const { layers, source } = await mounted(images[format].reference, 'oci.insecure');
      expect(source).toBe(images[format].reference);
      expect(layers.map(({ digest }) => digest)).toEqual(
        images[format].image.layers.map(({ digest }) => digest),
      );
      expect(new Set(layers.map(({ index }) => index))).toEqual(
        new Set([format === 'erofs' ? 'none' : 'made']),
      );
      await same('whole');
      expect(await listed()).toEqual([
        expect.objectContaining({ mountPoint: target, state: 'served', source: images[format].reference }),
      ]);
      await expect(writeFile(path.join(target, 'new'), '')).rejects.toThrow(/EROFS|read-only/);
      await unmounted();
    });
  }

  elsewhere('shows one layer, by number or digest, with the flags of the mount', async () => {
    const { reference, image } = images['tar+gzip'];
    await mounted(reference, 'oci.layer=1,nosuid');
    await same(1);
    const line = (await readFile('/proc/self/mountinfo', 'utf8'))
      .split('\n')
      .find((one) => one.includes(` ${target} `));
    expect(line?.split(' ')[5]?.split(',')).toEqual(expect.arrayContaining(['ro', 'nosuid']));
    await unmounted();
    const record = await mounted(
      reference,
      `oci.blob=${image.layers[1]?.digest}`,
      'oci.platform=linux/amd64',
    );
    // Indexed by the mount of another time.
    expect(record.layers).toEqual([expect.objectContaining({ index: 'here' })]);
    await same(1);
    await unmounted();
  });

  elsewhere(
    'reads a layer through a tarindex and a zinfo of mkfs.erofs, without one of its own',
    async () => {
      const { reference, image } = images['tar+gzip'];
      const digest = image.layers[0]?.digest ?? '';
      const [tarindex, zinfo] = [at('theirs.erofs'), at('theirs.zinfo')];
      referenceGzipIndex(blobPath(image.layout, digest), tarindex, zinfo);
      await rm(at('kept'), { recursive: true, force: true });
      const record = await mounted(reference, `oci.layer=0,oci.tarindex=${tarindex},oci.zinfo=${zinfo}`);
      expect(record.layers).toEqual([expect.objectContaining({ digest, index: 'given' })]);
      expect(await readdir(at('kept/index'))).toEqual([]);
      await same(0);
      await unmounted();
      // A tar has no zinfo.
      const tar = images.tar;
      referenceTarIndex(blobPath(tar.image.layout, tar.image.layers[0]?.digest ?? ''), tarindex);
      await mounted(tar.reference, 'oci.layer=0', `oci.tarindex=${tarindex}`);
      await same(0);
      await unmounted();
    },
  );

  elsewhere(
    'shows files: an EROFS image, a tar and a tar.gz, with indexes of mkfs.erofs or its own',
    async () => {
      const blob = (format: 'erofs' | 'tar' | 'tar+gzip'): string =>
        blobPath(images[format].image.layout, images[format].image.layers[0]?.digest ?? '');
      const [tarindex, zinfo] = [at('file.erofs'), at('file.zinfo')];
      referenceGzipIndex(blob('tar+gzip'), tarindex, zinfo);
      const given = `oci.tarindex=${tarindex}`;
      for (const [file, index, ...options] of [
        [blob('erofs'), 'none'],
        [blob('tar'), 'given', given],
        [blob('tar+gzip'), 'given', given, `oci.zinfo=${zinfo}`],
        [blob('tar'), 'made'],
        [blob('tar+gzip'), 'made'],
      ] as const) {
        await rm(at('kept'), { recursive: true, force: true });
        const { layers, source } = await mounted(file, ...options);
        expect([source, layers.map((layer) => layer.index)]).toEqual([file, [index]]);
        await same(0);
        await unmounted();
      }
    },
  );

  test(
    'shows the same tree as mount.erofs with the same options',
    async () => {
      const [program, ...parameters] = await mountErofs();
      const theirs = at('mount-erofs');
      await mkdir(theirs, { recursive: true });
      const digestOf = (format: 'erofs' | 'tar' | 'tar+gzip'): string =>
        images[format].image.layers[0]?.digest ?? '';
      const [tarindex, zinfo] = [at('same.erofs'), at('same.zinfo')];
      const gzip = blobPath(images['tar+gzip'].image.layout, digestOf('tar+gzip'));
      referenceGzipIndex(gzip, tarindex, zinfo);
      const given = `oci.tarindex=${tarindex}`;
      for (const [source, ...options] of [
        [images.erofs.reference, 'oci.layer=0', 'oci.platform=linux/amd64'],
        [images.erofs.reference, `oci.blob=${digestOf('erofs')}`],
        [images.tar.reference, `oci.blob=${digestOf('tar')}`, given],
        [images['tar+gzip'].reference, `oci.blob=${digestOf('tar+gzip')}`, given, `oci.zinfo=${zinfo}`],
        [blobPath(images.erofs.image.layout, digestOf('erofs'))],
      ] as const) {
        const isRemote = options.length > 0;
        const all = [...options, ...(isRemote ? ['oci.insecure'] : [])];
        await mounted(source, ...all);
        const words = [...(isRemote ? ['-o', all.join(',')] : []), source, theirs];
        const mountTheirs = [program, ...parameters, '-t', 'erofs.nbd', ...words];
        // Into a file, for its server keeps the streams open, and a pipe would be waited for.
        await execa('sh', ['-c', 'exec "$@" >"$0" 2>&1', at('mount-erofs.log'), ...mountTheirs], {
          timeout: patience(60_000),
          killSignal: 'SIGKILL',
        });
        const device = (await mountAt(theirs))?.source ?? '';
        expect(device).toMatch(/^\/dev\/nbd\d+$/);
        try {
          const trees = [];
          for (const place of [target, theirs]) trees.push(await compareMountedTree(place, [treeOf(0)]));
          expect(trees[0]).toEqual(trees[1]);
          expect(trees[0]?.entries).toBeGreaterThan(50);
          expect(trees[0]?.differences).toEqual({ 'tree-0.jsonl': [] });
        } finally {
          await execa('umount', [theirs]);
          // It fails where the device has gone by itself, as it should; on Linux 6.12 it does not.
          await execa(program, [...parameters, '--disconnect', device], {
            reject: false,
            timeout: patience(10_000),
          });
        }
        await unmounted();
      }
    },
    async () => {
      const nbd = await probeNbd();
      return nbd.available ? undefined : `mount.erofs serves with nbd alone: ${nbd.reason}`;
    },
  );

  test('goes on when the process that serves it is killed, for whoever has something open', async () => {
    await mounted(images.erofs.reference);
    const [before] = await listed();
    const reader = execa('sh', ['-c', 'exec 3<etc/motd; read -r _; cat - data/more <&3 | sha256sum'], {
      cwd: target,
      timeout: patience(60_000),
      killSignal: 'SIGKILL',
    });
    process.kill(before?.pid ?? 0, 'SIGKILL');
    await expect.poll(async () => (await listed())[0]?.state).toBe('served');
    expect((await listed())[0]?.pid).not.toBe(before?.pid);
    reader.stdin?.end('\n');
    const { stdout } = await execa('sh', ['-c', 'cat etc/motd data/more | sha256sum'], { cwd: at('flat') });
    expect((await reader).stdout).toBe(stdout);
    // Twice: the one that came by itself is watched too.
    process.kill((await listed())[0]?.pid ?? 0, 'SIGKILL');
    await expect.poll(async () => (await listed())[0]?.state).toBe('served');
    await same('whole');
    await unmounted();
  });

  test('is reattached by hand, by its device or its place, also when nobody watches over it', async () => {
    await mounted(images.erofs.reference, 'oci.layer=0');
    process.kill(await recorded('watcher'), 'SIGKILL');
    const [before] = await listed();
    process.kill(before?.pid ?? 0, 'SIGKILL');
    await expect.poll(async () => (await listed())[0]?.state).toBe('waiting');
    // Whoever looks at the device waits for who serves it.
    const device = (await mountAt(target))?.source ?? '';
    const { exitCode, stdout } = await run('reattach', '--json', device);
    expect(exitCode).toBe(0);
    expect(JSON.parse(stdout)).toEqual({
      mounts: [expect.objectContaining({ mountPoint: target, mount: 'kept' })],
    });
    await same(0);
    const { pid } = (await listed())[0] as ListedMount;
    expect(await run('reattach', '--all')).toEqual({
      exitCode: 0,
      stdout: expect.stringContaining(`served by process ${pid}`) as unknown,
      stderr: '',
    });
    await unmounted();
  });

  test(
    'is mounted again when nobody has kept its devices',
    async () => {
      await mounted(images.erofs.reference);
      // The FUSE connection ends with the last of them.
      for (const name of ['watcher', 'fuse-keeper', 'blobserve'])
        process.kill(await recorded(name), 'SIGKILL');
      const { exitCode, stdout } = await run('reattach', '--json', target);
      expect(exitCode).toBe(0);
      expect(JSON.parse(stdout)).toEqual({ mounts: [expect.objectContaining({ mount: 'mounted again' })] });
      await same('whole');
      await unmounted();
    },
    async () => ((await expectedBackend()) === 'fuse' ? undefined : 'the kernel keeps nbd devices'),
  );

  /** A process that the mount has written down. */
  async function recorded(name: string): Promise<number> {
    const [root = ''] = await readdir(at('runtime'));
    const text = await readFile(path.join(at('runtime'), root, `${name}.json`), 'utf8');
    return (JSON.parse(text) as { pid: number }).pid;
  }

  elsewhere('takes a password that no file has, and reads with it after the process was killed', async () => {
    const proxy = await passwordProxy(registry.directAddress);
    try {
      const image = images.erofs.reference.replace(/^[^/]+/, proxy.address);
      const refused = await mount(image);
      expect(refused.exitCode).toBe(1);
      expect(refused.stderr).toMatch(/401|denied|credentials/i);
      await nothingLeft();
      await rm(at('kept'), { recursive: true, force: true });
      const file = at('password');
      await writeFile(file, `${PASSWORD}\n`, { mode: 0o600 });
      await mounted(image, `oci.username=me,oci.password_file=${file}`);
      await rm(file);
      const { exitCode } = await execa('grep', ['-rIl', PASSWORD, at('runtime'), at('kept')], {
        reject: false,
      });
      expect(exitCode).toBe(1);
      process.kill((await listed())[0]?.pid ?? 0, 'SIGKILL');
      await expect.poll(async () => (await listed())[0]?.state).toBe('served');
      await same('whole');
      expect(proxy.refused()).toBeGreaterThan(0);
      await unmounted();
    } finally {
      await proxy.close();
    }
  });

  /** A mount that waits for a registry that has fallen silent. */
  async function waitingMount(proxy: Awaited<ReturnType<typeof passwordProxy>>) {
    const image = images['tar+gzip'].reference.replace(/^[^/]+/, proxy.address);
    const words = ['mount', ...kept, '-o', `oci.username=me,oci.password=${PASSWORD}`, image, target];
    const child = execa(process.execPath, [COMMAND, ...words], { reject: false, timeout: patience(120_000) });
    await expect.poll(() => proxy.silent()).toBeGreaterThan(0);
    return { process: child };
  }

  test('leaves nothing behind when it is interrupted while the registry is silent', async () => {
    await rm(at('kept'), { recursive: true, force: true });
    const proxy = await passwordProxy(registry.directAddress, { silentBlobs: true });
    try {
      const { process: child } = await waitingMount(proxy);
      child.kill('SIGINT');
      expect((await child).exitCode).toBe(130);
      await nothingLeft();
    } finally {
      await proxy.close();
    }
  });

  elsewhere('takes away what a mount that was killed has left, with the next one', async () => {
    await rm(at('kept'), { recursive: true, force: true });
    const proxy = await passwordProxy(registry.directAddress, { silentBlobs: true });
    try {
      const { process: child } = await waitingMount(proxy);
      child.kill('SIGKILL');
      await child;
      expect((await listed()).map(({ state }) => state)).toEqual(['mounting']);
    } finally {
      await proxy.close();
    }
    await mounted(images.erofs.reference);
    await same('whole');
    await unmounted();
  });

  elsewhere('refuses what contradicts itself, naming the option, and leaves nothing', async () => {
    const { reference, image } = images['tar+gzip'];
    const refused = async (
      code: number,
      said: RegExp,
      source: string,
      ...options: string[]
    ): Promise<void> => {
      const { exitCode, stdout, stderr } = await mount(source, ...options);
      expect({ exitCode, stdout }).toEqual({ exitCode: code, stdout: '' });
      expect((JSON.parse(stderr) as { error: string }).error).toMatch(said);
      await nothingLeft();
    };
    const digest = image.layers[0]?.digest ?? '';
    const file = blobPath(image.layout, digest);
    await refused(2, /^-o oci\.layer: /, reference, `oci.blob=${digest}`, 'oci.layer=1');
    await refused(2, /^-o oci\.tarindex: /, reference, 'oci.tarindex=/x');
    await refused(2, /^-o oci\.layer: /, file, 'oci.layer=1');
    await refused(2, /^-o oci\.tarindex: .*oci\.zinfo/, reference, `oci.layer=0,oci.tarindex=${treeOf(0)}`);
    await refused(1, /^-o oci\.layer=3: .*0 to 2/, reference, 'oci.layer=3');
    await refused(1, /^-o oci\.blob: /, reference, `oci.blob=${'0'.repeat(64)}`);
    await refused(1, /neither an EROFS image nor a tar/, treeOf('whole'));
    await refused(1, /cannot be opened \(ENOENT\)/, at('nothing'));
    const [tarindex, zinfo] = [at('other.erofs'), at('other.zinfo')];
    referenceGzipIndex(blobPath(image.layout, image.layers[1]?.digest ?? ''), tarindex, zinfo);
    const given = `oci.layer=0,oci.tarindex=${tarindex},oci.zinfo=${zinfo}`;
    await refused(1, /is it of another layer/, reference, given);
    await refused(1, /magic/, reference, `oci.layer=0,oci.tarindex=${treeOf(0)},oci.zinfo=${zinfo}`);
  });

  test('refuses to mount twice, and to unmount what is in use', async () => {
    await mounted(images.erofs.reference);
    const again = await mount(images.erofs.reference);
    expect([again.exitCode, again.stderr]).toEqual([1, expect.stringContaining('is mounted there already')]);
    const user = execa('sleep', ['600'], { cwd: target, reject: false });
    await once(user, 'spawn');
    const busy = await run('umount', target);
    expect([busy.exitCode, busy.stderr]).toEqual([1, expect.stringContaining('is in use')]);
    await same('whole');
    user.kill('SIGKILL');
    await user;
    await symlink(target, at('link'));
    expect(await run('umount', at('link'))).toEqual({ exitCode: 0, stdout: '', stderr: '' });
    await nothingLeft();
    const gone = await run('umount', target);
    expect([gone.exitCode, gone.stderr]).toEqual([1, expect.stringContaining('nothing is mounted there')]);
  });

  elsewhere(
    'says to users without rights that it needs root',
    async () => {
      const { exitCode, stderr } = await erofsNbd(['mount', 'debian', '/mnt'], NOBODY);
      expect([exitCode, stderr]).toEqual([1, expect.stringContaining('mounting needs root')]);
    },
    nobodyCannot,
  );
});

/** A registry behind a password, which may say nothing when it is asked for layers. */
async function passwordProxy(
  registry: string,
  { silentBlobs = false } = {},
): Promise<{ address: string; refused(): number; silent(): number; close(): Promise<void> }> {
  const expected = `Basic ${Buffer.from(`me:${PASSWORD}`).toString('base64')}`;
  let [refused, silent] = [0, 0];
  const [host, port] = registry.split(':');
  const server: Server = createServer((incoming, outgoing) => {
    if (incoming.headers.authorization !== expected) {
      refused += 1;
      outgoing.writeHead(401, { 'www-authenticate': 'Basic realm="test"' }).end();
      return;
    }
    if (silentBlobs && incoming.headers.range !== undefined) {
      silent += 1;
      return;
    }
    const { method, url: path, headers } = incoming;
    const passed = { ...headers, authorization: undefined, host: registry };
    const onward = request({
      host,
      port,
      method,
      path,
      headers: JSON.parse(JSON.stringify(passed)) as OutgoingHttpHeaders,
    });
    onward.on('response', (answer) => {
      outgoing.writeHead(answer.statusCode ?? 502, answer.headers);
      answer.pipe(outgoing);
    });
    onward.on('error', () => outgoing.destroy());
    incoming.pipe(onward);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    address: `127.0.0.1:${(server.address() as AddressInfo).port}`,
    refused: () => refused,
    silent: () => silent,
    close: async () => {
      server.closeAllConnections();
      server.close();
      await once(server, 'close');
    },
  };
}
