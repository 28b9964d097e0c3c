/** What goes on with a blob beside the reads: its download, its verification, and what becomes of one that is another. */
import { randomBytes } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { parseConfiguration } from '../daemon/configuration.js';
import { control } from '../proto/messages.js';
import { FaultServer, status, wrongRange, type Fault } from '../test/fault-server.js';
import { patience } from '../test/patience.js';
import { hashBlob } from './blob-hash.js';
import { LayerPaths, LayerRefusedError, type LayerPath, type LayerPathsOptions } from './data-path.js';
import { LayerBlobs } from './layer-blobs.js';
import { LayerIndexer } from './layer-indexer.js';
import { SUPER_BLOCK, SUPER_OFFSET } from './layer/erofs/format.js';
import { ReadError } from './readers/blob-reader.js';
import { cachePaths } from './readers/span-store.js';
import { RegistryClient } from './registry/registry-client.js';

const SPAN = 4096;
const SIZE = 40 * SPAN;
const QUIET = { timeout: patience(30_000), interval: 20 };

let dir: string;
let server: FaultServer;
let client: RegistryClient;
let lines: string[];
let image: Buffer;
let digest: string;
let running: { blobs: LayerBlobs; paths: LayerPath[] }[];

const log = pino({ level: 'info' }, { write: (line: string) => void lines.push(line) });

/** Not for a kernel: a super block that our check takes, and noise. */
function imageOfNoise(): Buffer {
  const bytes = randomBytes(SIZE);
  bytes.fill(0, 0, SPAN);
  SUPER_BLOCK.write(bytes, SUPER_OFFSET, { magic: 0xe0f5e1e2, blockSizeBits: 12, blocks: SIZE / SPAN });
  return bytes;
}

beforeEach(async () => {
  dir = mkdtempSync('/var/tmp/layer-blobs-');
  lines = [];
  running = [];
  server = await FaultServer.start();
  client = new RegistryClient({ connectionsPerHost: 4 });
  image = imageOfNoise();
  digest = server.addBlob(image);
});

afterEach(async () => {
  for (const node of running) await stop(node);
  await client.close();
  await server.close();
  rmSync(dir, { recursive: true });
});

interface Node {
  readonly open: (checked?: boolean) => Promise<LayerPath>;
  readonly blobs: LayerBlobs;
  readonly paths: LayerPath[];
}

/** A data plane without devices. */
async function node(settings = '', spans = '4KiB'): Promise<Node> {
  const text = `[cache]\nspan_size = "${spans}"\nmin_free = "0B"\n[fetch]\nmax_range = "16KiB"\nreadahead = "0B"\nread_deadline = "1s"\n${settings}`;
  const configuration = parseConfiguration(text, 'test');
  const blobs = new LayerBlobs({
    configuration,
    cacheDirectory: join(dir, 'cache'),
    digestsDirectory: join(dir, 'digests'),
    client,
    hash: (request) => Promise.resolve(hashBlob(request)),
    log,
  });
  await blobs.start();
  const {
    span_size: spanSize,
    max_uncompressed: maxUncompressedBytes,
    max_entries: maxEntries,
  } = configuration.index;
  const indexer = new LayerIndexer({
    directory: dir,
    workers: 1,
    spanSize,
    maxUncompressedBytes,
    maxEntries,
    log,
  });
  const options = { configuration, blobs, indexer, log };
  // Native layers need no more.
  const layers = new LayerPaths(options as unknown as LayerPathsOptions);
  const paths: LayerPath[] = [];
  const open = async (checked = false): Promise<LayerPath> => {
    const source = {
      imageRef: `${server.host}/team/app:latest`,
      layerDigest: digest,
      size: SIZE,
      kind: control.LayerKind.EROFS,
    };
    const path = await layers.open(source, checked, new AbortController().signal);
    paths.push(path);
    return path;
  };
  const started = { open, blobs, paths };
  running.push(started);
  return started;
}

async function stop({ blobs, paths }: { blobs: LayerBlobs; paths: LayerPath[] }): Promise<void> {
  for (const path of paths.splice(0)) await path.close();
  await blobs.close();
}

async function bytesOf({ reader }: LayerPath, offset: number, length: number): Promise<Buffer> {
  const target = Buffer.alloc(length);
  await reader.read(target, offset);
  return target;
}

const said = (message: string): number => lines.filter((line) => line.includes(message)).length;
const NOW = '[background]\ndelay = "0s"\n';
const NEVER = '[background]\ndownload = false\n';

/** Flips a bit of every answer that has the byte at `position`. */
const flipAt =
  (position: number): Fault =>
  (exchange) => {
    const [, first = ''] = /^bytes=(\d+)-/.exec(exchange.request.headers.range ?? '') ?? [];
    wrongRange({
      body: (range) => {
        const bytes = Buffer.from(range);
        const at = position - Number(first);
        if (at >= 0 && at < bytes.length) bytes[at] = (bytes[at] ?? 0) ^ 1;
        return bytes;
      },
    })(exchange);
  };

describe('a layer that is attached', () => {
  it('is downloaded to its end, each byte once, verified, and served without the registry for good', async () => {
    const first = await node(NOW);
    const path = await first.open();
    await expect.poll(() => said('complete and verified'), QUIET).toBe(1);
    const asked = server.requests.filter(({ path: what }) => what.includes(digest));
    expect(path.statistics().fetchedBytes).toBe(SIZE);
    expect(asked.length).toBeLessThanOrEqual(SIZE / (4 * SPAN) + 2);
    await stop(first);

    server.failAlways('/', status(503));
    server.requests.length = 0;
    const second = await node(NOW);
    for (const checked of [false, true]) {
      expect((await bytesOf(await second.open(checked), 0, SIZE)).equals(image)).toBe(true);
    }
    expect(server.requests).toEqual([]);
    expect(said('complete and verified')).toBe(1);
  });

  it('is verified when its readers complete it, and nothing is downloaded that they do not want', async () => {
    const one = await node(NEVER);
    const path = await one.open();
    await new Promise((resolve) => setTimeout(resolve, 200));
    expect(path.statistics().fetchedBytes).toBe(SPAN);
    expect((await bytesOf(path, 0, SIZE)).equals(image)).toBe(true);
    await expect.poll(() => said('complete and verified'), QUIET).toBe(1);
    expect(path.statistics().fetchedBytes).toBe(SIZE);
  });

  it('is left alone outside the hours, and where the rest of it does not fit', async () => {
    const hour = new Date().getHours();
    const two = (number: number): string => String(number % 24).padStart(2, '0');
    for (const settings of [
      `${NOW}window = "${two(hour + 2)}:00-${two(hour + 3)}:00"\n`,
      `${NOW}`.replace('[background]', '[background]\nrate = "1B"'),
    ]) {
      const one = await node(settings);
      const path = await one.open();
      await new Promise((resolve) => setTimeout(resolve, 3500));
      // At one byte per second the first range is the last one for hours.
      expect(path.statistics().fetchedBytes).toBeLessThanOrEqual(5 * SPAN);
      await stop(one);
      rmSync(join(dir, 'cache'), { recursive: true });
    }
  });
});

describe('a registry that sends another blob', () => {
  it('is named when the layer is complete: reads fail from then on, nothing is kept, and the next pull is refused', async () => {
    server.failAlways('/blobs/', flipAt(17 * SPAN + 5));
    const first = await node(NEVER);
    const path = await first.open();
    await bytesOf(path, 0, SIZE);
    await expect.poll(() => said('THE REGISTRY HAS SENT ANOTHER BLOB'), QUIET).toBe(1);
    await expect.poll(() => path.statistics().cachedBytes, QUIET).toBe(0);
    await expect(bytesOf(path, 0, 1)).rejects.toMatchObject({ kind: 'corrupt' });
    await expect(bytesOf(path, 0, 1)).rejects.toThrow(new RegExp(`${server.host}/team/app has sent`));
    expect(path.reader.readNow(Buffer.alloc(1), 0)).toBe(false);
    await stop(first);

    // Also in the next process: a layer that was mounted fails, one that is pulled is looked at as a whole first.
    const second = await node(NEVER);
    await expect(bytesOf(await second.open(true), 0, 1)).rejects.toMatchObject({ kind: 'corrupt' });
    await expect(second.open()).rejects.toThrow(/has the digest|another blob came/);
    await stop(second);

    // When it tells the truth again, all is well.
    server.behaveAgain();
    const third = await node(NEVER);
    expect((await bytesOf(await third.open(), 0, SIZE)).equals(image)).toBe(true);
  });

  it('is caught before a byte is used when the blob was complete here once', async () => {
    const first = await node(NOW);
    await first.open();
    await expect.poll(() => said('complete and verified'), QUIET).toBe(1);
    await stop(first);
    rmSync(join(dir, 'cache'), { recursive: true });

    server.fail('/blobs/', flipAt(5));
    server.failAlways('/blobs/', flipAt(17 * SPAN + 5));
    const second = await node(NEVER);
    const path = await second.open();
    // Once garbled on the way: asked for again, and right.
    expect((await bytesOf(path, 0, 17 * SPAN)).equals(image.subarray(0, 17 * SPAN))).toBe(true);
    const wrong = bytesOf(path, 17 * SPAN, 10);
    await expect(wrong).rejects.toMatchObject({ kind: 'corrupt' });
    await expect(wrong).rejects.toThrow(
      new RegExp(`span 17, .*${server.host}/team/app.*when the blob was complete`),
    );
    expect((await bytesOf(path, 18 * SPAN, 10)).equals(image.subarray(18 * SPAN, 18 * SPAN + 10))).toBe(true);
    expect(said('wrong bytes came')).toBeGreaterThan(2);
  });
});

describe('a cache file that was changed by hand', () => {
  it('is caught by its digests, also with a checksum that was changed along, and fetched again', async () => {
    const first = await node(NOW);
    await first.open();
    await expect.poll(() => said('complete and verified'), QUIET).toBe(1);
    await stop(first);
    const [data, map] = cachePaths(join(dir, 'cache'), digest);
    const bytes = readFileSync(data);
    bytes.writeUInt8(bytes.readUInt8(9 * SPAN) ^ 1, 9 * SPAN);
    writeFileSync(data, bytes);
    // As if somebody had written the map to fit: take the one of a store that was filled with the wrong bytes.
    rmSync(map);
    rmSync(data);
    const digests = join(dir, 'digests', digest.replace(':', '/'));
    const kept = readFileSync(digests);
    rmSync(digests);
    server.failAlways('/blobs/', flipAt(9 * SPAN));
    const forger = await node(NEVER);
    await bytesOf(await forger.open(), 8 * SPAN, 4 * SPAN);
    await stop(forger);
    writeFileSync(digests, kept);

    server.behaveAgain();
    const second = await node(NEVER);
    const path = await second.open();
    expect((await bytesOf(path, 8 * SPAN, 4 * SPAN)).equals(image.subarray(8 * SPAN, 12 * SPAN))).toBe(true);
    expect(path.statistics().fetchedBytes).toBe(SPAN);
    expect(said('cached span is damaged')).toBe(1);
  });

  it('before it was verified is not taken for what the registry has sent', async () => {
    const first = await node(NEVER);
    await bytesOf(await first.open(), 0, SIZE - SPAN);
    await stop(first);
    const [data] = cachePaths(join(dir, 'cache'), digest);
    const bytes = readFileSync(data);
    bytes.writeUInt8(bytes.readUInt8(9 * SPAN) ^ 1, 9 * SPAN);
    writeFileSync(data, bytes);
    const second = await node(NEVER);
    const path = await second.open();
    await bytesOf(path, SIZE - SPAN, SPAN);
    await expect.poll(() => said('not as they were written'), QUIET).toBe(1);
    expect(said('THE REGISTRY')).toBe(0);
    expect((await bytesOf(path, 0, SIZE)).equals(image)).toBe(true);
    expect(path.statistics().fetchedBytes).toBe(2 * SPAN);
  });
});

describe('the spans of a blob', () => {
  it('are as its files were made, whatever new ones are made with', async () => {
    const first = await node(NOW);
    await first.open();
    await expect.poll(() => said('complete and verified'), QUIET).toBe(1);
    await stop(first);
    server.requests.length = 0;
    // By the map, then by the digests alone.
    const settings = '[background]\ndownload = false\n';
    const second = await node(settings, '16KiB');
    expect((await bytesOf(await second.open(), 0, SIZE)).equals(image)).toBe(true);
    await stop(second);
    expect(server.requests).toEqual([]);
    rmSync(join(dir, 'cache'), { recursive: true });
    server.failAlways('/blobs/', flipAt(9 * SPAN));
    const third = await node(settings, '16KiB');
    const path = await third.open();
    expect((await bytesOf(path, 20 * SPAN, SPAN)).equals(image.subarray(20 * SPAN, 21 * SPAN))).toBe(true);
    await expect(bytesOf(path, 9 * SPAN, SPAN)).rejects.toThrow(/span 9, 4096 bytes/);
  });
});

describe('a blob that is opened ahead', () => {
  const source = () => ({ imageRef: `${server.host}/team/app:latest`, layerDigest: digest, size: SIZE });

  it('is the one that the layer is attached with: what was fetched of it is not fetched again', async () => {
    const one = await node(NEVER);
    const ahead = await one.blobs.openAhead(source());
    await ahead?.cache.fill(0, 8 * SPAN, 'ahead');
    expect(await one.blobs.openAhead(source())).toBeUndefined();
    const path = await one.open();
    expect(path.blob).toBe(ahead);
    expect((await bytesOf(path, 0, 8 * SPAN)).equals(image.subarray(0, 8 * SPAN))).toBe(true);
    expect(path.statistics().fetchedBytes).toBe(8 * SPAN);
    // Of one that is attached there is nothing to open ahead, and the next who attaches it has his own.
    expect(await one.blobs.openAhead(source())).toBeUndefined();
    expect((await one.open()).blob).not.toBe(ahead);
  });

  it('is not used for another image, and closed when the process ends', async () => {
    const one = await node(NEVER);
    const ahead = await one.blobs.openAhead({ ...source(), imageRef: `${server.host}/team/other:latest` });
    expect((await one.open()).blob).not.toBe(ahead);
    expect(ahead?.cache.closed).toBe(false);
    await stop(one);
    expect(ahead?.cache.closed).toBe(true);
  });
});

describe('in strict mode', () => {
  const STRICT = `${NEVER}[integrity]\nverify = "strict"\n`;

  it('a layer is refused that cannot be verified before it is used, and served when it can', async () => {
    const first = await node(STRICT);
    await expect(first.open()).rejects.toThrow(LayerRefusedError);
    await expect(first.open()).rejects.toThrow(/strict.*Publish/);
    await stop(first);
    const second = await node(NOW);
    await second.open();
    await expect.poll(() => said('complete and verified'), QUIET).toBe(1);
    await stop(second);
    rmSync(join(dir, 'cache'), { recursive: true });
    const third = await node(STRICT);
    expect((await bytesOf(await third.open(), 0, SIZE)).equals(image)).toBe(true);
    server.failAlways('/blobs/', flipAt(0));
    await stop(third);
    rmSync(join(dir, 'cache'), { recursive: true });
    const fourth = await node(STRICT);
    await expect(fourth.open()).rejects.toThrow(ReadError);
  });
});
