/**
 * Indexes made by erofs-utils are served by our daemons, and ours are served by mount.erofs and read by fsck.erofs and
 * dump.erofs: the tree is the same every time.
 */
import { createWriteStream } from 'node:fs';
import { copyFile, mkdir, readdir, readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { probeNbd } from '../../blobserve/attach/nbd-device.js';
import { bytesSource, encodeZinfo, ZinfoIndex } from '../../blobserve/layer/gzip/zinfo.js';
import { importIndex, ZwinIndex } from '../../blobserve/layer/gzip/zwin.js';
import { digestFile, INDEX_FORMAT, writeIndexRecord } from '../../blobserve/layer/index/layer-index.js';
import { mountErofs } from '../debian/mount-erofs.js';
import { dumpErofs, extractErofs, fetchErofsUtils, fsckErofs, referenceGzipIndex } from '../erofs-utils.js';
import { patience } from '../patience.js';
import { compareDevice, compareMountedTree } from '../trees/compare.js';
import { buildRealLayer, LAYERS_OF, type RealLayer } from '../trees/real-layers.js';
import { readTreeFile } from '../trees/tree-file.js';
import { LayerNode, type PushedImage } from './layer-node.js';
import { logged } from './node-state.js';
import { brief, missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
const NAMES = brief ? (['attributes'] as const) : LAYERS_OF.small;

describe('an index', () => {
  let whyNot = missing;
  let node: LayerNode;
  let reals: RealLayer[] = [];
  let image: PushedImage;
  const at = (name: string): string => path.join(node.stack.directory, name);

  beforeAll(async () => {
    if (whyNot !== undefined) return;
    try {
      fetchErofsUtils();
      reals = [];
      for (const name of NAMES) reals.push(await buildRealLayer(name));
    } catch (error) {
      whyNot = `what is needed cannot be had: ${error instanceof Error ? error.message : String(error)}`;
      return;
    }
    node = await LayerNode.start('version = 1\n');
    image = await node.push(
      'interoperation',
      reals.map(({ composed }) => composed),
    );
  }, patience(1_200_000));
  afterAll(async () => {
    await node?.remove();
  });

  const test = (name: string, body: () => Promise<void>, needs?: () => Promise<string | undefined>) =>
    it(name, async (context) => {
      const reason = whyNot ?? (await needs?.());
      if (reason !== undefined) return context.skip(reason);
      await body();
    });

  test('made by mkfs.erofs --tar=i --gzinfo is served by our daemons', async () => {
    const theirs = new Map<string, string>();
    for (const real of reals) {
      const files = node.indexFiles(real.composed.blob.digest);
      const [tarindex, zinfo] = [at('theirs.erofs'), at('theirs.zinfo')];
      referenceGzipIndex(real.blob, tarindex, zinfo);
      await mkdir(path.dirname(files.record), { recursive: true });
      await copyFile(tarindex, files.tarindex);
      const sizes = { compressed: real.composed.blob.size, uncompressed: real.tarBytes };
      await importIndex(await ZinfoIndex.open(bytesSource(await readFile(zinfo)), sizes), files.checkpoints);
      const { digest: tarindexDigest, size: tarindexSize } = await digestFile(files.tarindex);
      await writeIndexRecord(files, {
        format: INDEX_FORMAT,
        digest: real.composed.blob.digest,
        diffId: real.composed.diffId,
        compression: 'gzip',
        blobSize: sizes.compressed,
        tarSize: sizes.uncompressed,
        tarindexSize,
        tarindexDigest,
        checkpointsDigest: (await digestFile(files.checkpoints)).digest,
        deviceSize: tarindexSize + Math.ceil(sizes.uncompressed / 512) * 512,
      });
      theirs.set(files.tarindex, tarindexDigest);
      theirs.set(files.checkpoints, (await digestFile(files.checkpoints)).digest);
    }
    for (const [number, served] of (await node.serve(image)).entries()) {
      const real = reals[number] as RealLayer;
      const { differences, reads } = await compareDevice(served.device, served.index, real.tar);
      expect(differences, real.name).toEqual([]);
      expect(reads).toBeGreaterThan(100);
      const compared = await compareMountedTree(served.mountPoint, [real.trees.tar]);
      expect(compared, real.name).toEqual({ entries: real.entries, differences: { 'tar.jsonl': [] } });
    }
    // It was theirs that has been served.
    for (const [file, digest] of theirs) expect((await digestFile(file)).digest).toBe(digest);
    expect(await logged(node.snapshotter, 'index is unusable')).toEqual([]);
  });

  /** Has our daemons make the indexes that are on the node. */
  const indexByOurselves = async (): Promise<void> => {
    await node.removeSnapshots();
    for (const { composed } of reals) await rm(node.indexFiles(composed.blob.digest).record, { force: true });
    await node.serve(image);
  };

  const readsOurs = async (): Promise<void> => {
    await indexByOurselves();
    for (const real of reals) {
      const { tarindex } = node.indexFiles(real.composed.blob.digest);
      fsckErofs(tarindex);
      const into = at(`extracted-${real.name}`);
      extractErofs(tarindex, real.tar, into);
      // fsck.erofs sets times of directories before it fills them, and extracts hard links as it comes to them.
      const ignore = ['xattrs', 'mtimeNs'];
      const compared = await compareMountedTree(into, [real.trees.tar], ignore);
      expect(compared, real.name).toEqual({ entries: real.entries, differences: { 'tar.jsonl': [] } });
      await rm(into, { recursive: true });
      // What dump.erofs says of an inode is the same as of mkfs.erofs' one, but for its number.
      referenceGzipIndex(real.blob, at('theirs.erofs'), at('theirs.zinfo'));
      const names = [...(await readTreeFile(real.trees.tar)).keys()];
      const step = Math.ceil(names.length / 40);
      for (const name of names.filter((_, number) => number % step === 0)) {
        const say = (index: string): string[] =>
          dumpErofs(index, '-e', `--path=/${name}`)
            .split('\n')
            // Where and how an image keeps its own metadata is its own affair: of extents, those in the tar.
            .filter((line) => !/^(NID|Inode size|Path)|^ +\d+:/.test(line) || line.endsWith('# device 1'));
        expect(say(tarindex), name).toEqual(say(at('theirs.erofs')));
      }
    }
  };
  // It needs no device, and minutes where every instruction is emulated.
  if (!brief) test('made by our daemons is read by fsck.erofs and dump.erofs', readsOurs);

  test(
    'made by our daemons is served by mount.erofs, from the same registry',
    async () => {
      const [program, ...parameters] = await mountErofs();
      await indexByOurselves();
      await node.removeSnapshots();
      expect(await nbdInUse()).toEqual([]);
      const target = at('mount-erofs');
      await mkdir(target);
      for (const real of reals) {
        const { digest } = real.composed.blob;
        const files = node.indexFiles(digest);
        const [tarindex, zinfo] = [at('ours.erofs'), at('ours.zinfo')];
        await copyFile(files.tarindex, tarindex);
        const checkpoints = await ZwinIndex.open(files.checkpoints);
        await pipeline(encodeZinfo(checkpoints), createWriteStream(zinfo));
        await checkpoints.close();
        const source = [
          `oci.blob=${digest}`,
          `oci.tarindex=${tarindex}`,
          `oci.zinfo=${zinfo}`,
          'oci.insecure',
        ];
        const mount = [...parameters, '-t', 'erofs.nbd', '-o', source.join(','), image.reference, target];
        // Into a file, for its server keeps the streams open, and a pipe would be waited for.
        const quietly = ['-c', 'exec "$@" >"$0" 2>&1', at('mount-erofs.log'), program, ...mount];
        await execa('sh', quietly, { timeout: patience(60_000), killSignal: 'SIGKILL' });
        const mounted = (await readFile('/proc/self/mounts', 'utf8'))
          .split('\n')
          .find((line) => line.split(' ')[1] === target);
        try {
          expect(mounted).toMatch(/^\/dev\/nbd\d+ \S+ erofs ro/);
          const compared = await compareMountedTree(target, [real.trees.tar]);
          expect(compared, real.name).toEqual({ entries: real.entries, differences: { 'tar.jsonl': [] } });
        } finally {
          await execa('umount', [target]);
          // It fails where the device has gone by itself, as it should; on Linux 6.12 it does not.
          await execa(program, [...parameters, '--disconnect', mounted?.split(' ')[0] ?? ''], {
            reject: false,
            timeout: patience(10_000),
          });
        }
        await expect.poll(nbdInUse).toEqual([]);
      }
    },
    async () => {
      const nbd = await probeNbd();
      if (!nbd.available) return `mount.erofs serves with nbd alone: ${nbd.reason}`;
      return mountErofs().then(
        () => undefined,
        (error: unknown) => `mount.erofs cannot be built: ${String(error)}`,
      );
    },
  );
});

/** Devices that somebody serves. */
async function nbdInUse(): Promise<string[]> {
  const names = (await readdir('/sys/block')).filter((name) => name.startsWith('nbd'));
  const pids = await Promise.all(
    names.map((name) => readFile(`/sys/block/${name}/pid`, 'utf8').catch(() => undefined)),
  );
  return names.filter((_, number) => pids[number] !== undefined);
}
