import { randomBytes } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { gunzipSync, gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { entry, tar } from '../../test/hand-made-tar.js';
import { indexFiles, type LayerIndexRecord } from '../layer/index/layer-index.js';
import { LayerScan } from '../layer/index/layer-scan.js';
import { digestOf } from '../registry/digest.js';
import { ArtifactError, decodeConfig, encodeArtifact, type PublishedLayer } from './artifact.js';
import { importArtifact, type ArtifactImport } from './artifact-import.js';

const SUBJECT = {
  mediaType: 'application/vnd.oci.image.manifest.v1+json',
  digest: digestOf(Buffer.from('i')),
  size: 7,
};

let folder = '';
let record: LayerIndexRecord;
let tarindex: Buffer;
let checkpoints: Buffer;

beforeAll(async () => {
  folder = await mkdtemp('/var/tmp/artifact-');
  const blob = gzipSync(
    tar(entry({ name: 'a' }, randomBytes(300_000)), entry({ name: 'b' }, Buffer.from('b'))),
  );
  const files = indexFiles(path.join(folder, 'made'), digestOf(blob));
  const options = { files, compression: 'gzip', spanSize: 65_536, maxUncompressedBytes: 2 ** 30 } as const;
  const scan = await LayerScan.start(options);
  await scan.write(blob);
  record = await scan.finish();
  tarindex = gzipSync(await readFile(files.tarindex));
  checkpoints = await readFile(files.checkpoints);
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const published = (index = record): PublishedLayer => ({
  index,
  tarindex: { digest: digestOf(tarindex), size: tarindex.length },
  checkpoints: { digest: digestOf(checkpoints), size: checkpoints.length },
});

let imports = 0;
const wanted = (change: Partial<ArtifactImport> = {}): ArtifactImport => ({
  files: indexFiles(path.join(folder, `import-${++imports}`), record.digest),
  record,
  tarindex,
  checkpoints,
  digest: record.digest,
  size: record.blobSize,
  diffId: record.diffId,
  maxUncompressedBytes: 2 ** 30,
  maxTarindexBytes: 2 ** 20,
  ...change,
});

describe('the documents of a published index', () => {
  it('are the same bytes for the same layers, whatever this node knows besides', () => {
    const origin = { kind: 'soci', digest: SUBJECT.digest } as const;
    const [one, other] = [published(), published({ origin, ...record })];
    expect(encodeArtifact(SUBJECT, [one])).toEqual(encodeArtifact(SUBJECT, [other]));
  });

  it('say what was put in', () => {
    const { config, manifest } = encodeArtifact(SUBJECT, [published()]);
    const decoded = decodeConfig(config.body);
    expect([...decoded.layers]).toEqual([[record.digest, published()]]);
    expect(decoded.prefetch).toBeUndefined();
    expect(JSON.parse(manifest.body.toString())).toMatchObject({
      artifactType: 'application/vnd.erofs-nbd.index.v1',
      subject: SUBJECT,
      config: { digest: config.digest, size: config.body.length },
    });
  });

  it('has a prefetch list as its last blob, also when no layer has an index', () => {
    const list = { digest: `sha256:${'9'.repeat(64)}`, size: 100 };
    const { config, manifest } = encodeArtifact(SUBJECT, [], list);
    expect(decodeConfig(config.body)).toEqual({ layers: new Map(), prefetch: list });
    const { layers } = JSON.parse(manifest.body.toString()) as { layers: unknown[] };
    expect(layers).toEqual([{ mediaType: 'application/vnd.erofs-nbd.prefetch.v1+json', ...list }]);
  });

  const broken: [string, (layer: PublishedLayer) => unknown, RegExp][] = [
    ['not JSON', () => undefined, /not JSON/],
    ['another format', (layer) => ({ format: 2, layers: [layer] }), /format/],
    ['a layer twice', (layer) => ({ format: 1, layers: [layer, layer] }), /twice/],
    ['sizes that contradict', (layer) => entryWith(layer, { deviceSize: 512 }), /sizes contradict/],
    ['a negative size', (layer) => entryWith(layer, { tarSize: -1 }), /tarSize/],
    ['no digest of the blob', (layer) => entryWith(layer, { digest: 'x' }), /digest/],
  ];
  const entryWith = (layer: PublishedLayer, change: object): unknown => ({
    format: 1,
    layers: [{ ...layer, index: { ...layer.index, ...change } }],
  });
  it.each(broken)('with %s are refused', (_, change, message) => {
    const body = Buffer.from(JSON.stringify(change(published())) ?? 'nothing');
    expect(() => decodeConfig(body)).toThrow(ArtifactError);
    expect(() => decodeConfig(body)).toThrow(message);
  });
});

describe('a layer’s published index', () => {
  it('becomes the files it was made of', async () => {
    const options = wanted();
    expect(await importArtifact(options)).toEqual(record);
    expect(await readFile(options.files.tarindex)).toEqual(gunzipSync(tarindex));
    expect(await readFile(options.files.checkpoints)).toEqual(checkpoints);
  });

  const otherDigest = digestOf(Buffer.from('other'));
  const refused: [string, () => Partial<ArtifactImport>, RegExp][] = [
    ['of another layer', () => ({ digest: otherDigest }), /it is of layer/],
    ['of another size', () => ({ size: 5 }), /it is of layer/],
    ['that unpacks to something else', () => ({ diffId: otherDigest }), /the image says/],
    ['of a tar that is too large', () => ({ maxUncompressedBytes: 1000 }), /over 1000/],
    ['with a tarindex that is too large', () => ({ maxTarindexBytes: 512 }), /over 512/],
    ['with a tarindex that is no gzip', () => ({ tarindex: Buffer.from('x') }), /in gzip/],
    ['with a bomb for a tarindex', () => ({ tarindex: gzipSync(Buffer.alloc(10_000_000)) }), /in gzip/],
    [
      'with another tarindex',
      () => ({ tarindex: gzipSync(Buffer.alloc(record.tarindexSize)) }),
      /its tarindex has/,
    ],
    ['with other checkpoints', () => ({ checkpoints: Buffer.alloc(100) }), /its checkpoints has/],
    [
      'whose digests fit a tarindex no kernel should see',
      () => hostile(),
      /block|inode|root|checksum|blkszbits/i,
    ],
    [
      'whose digests fit checkpoints of nothing',
      () => withCheckpoints(Buffer.alloc(300)),
      /ZWIN|container|not/i,
    ],
  ];
  const hostile = (): Partial<ArtifactImport> => {
    const image = gunzipSync(tarindex);
    image.writeUInt32LE(0xffff_ffff, 1024 + 8);
    image.fill(0xee, 1300, 1400);
    return { tarindex: gzipSync(image), record: { ...record, tarindexDigest: digestOf(image) } };
  };
  const withCheckpoints = (bytes: Buffer): Partial<ArtifactImport> => ({
    checkpoints: bytes,
    record: { ...record, checkpointsDigest: digestOf(bytes) },
  });

  it.each(refused)('%s is refused and leaves nothing', async (_, change, message) => {
    const options = wanted(change());
    await expect(importArtifact(options)).rejects.toThrow(message);
    const left = await readdir(path.dirname(options.files.record)).catch(() => []);
    expect(left).toEqual([]);
  });

  it('with any byte changed, and digests that fit again, is refused or is whole', async () => {
    const image = gunzipSync(tarindex);
    let refusals = 0;
    for (let at = 1024; at < image.length; at += 3) {
      const changed = Buffer.from(image);
      changed[at] = (changed[at] ?? 0) ^ 0x55;
      const options = wanted({
        tarindex: gzipSync(changed, { level: 1 }),
        record: { ...record, tarindexDigest: digestOf(changed) },
      });
      await importArtifact(options).catch((error: unknown) => {
        expect(error).toBeInstanceOf(Error);
        refusals += 1;
      });
    }
    // The super block's checksum covers the first block alone.
    expect(refusals).toBeGreaterThan(50);
  });
});
