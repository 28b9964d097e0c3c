/**
 * `index` of a layer's file and of an image in a registry: what it makes, what an interruption leaves, and how it goes on.
 */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { indexFiles } from '../../blobserve/layer/index/layer-index.js';
import { FaultServer, requestedRange } from '../fault-server.js';
import { noise } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import { COMMAND, erofsNbd } from './run-command.js';

const MIB = 1 << 20;
const MEDIA = 'application/vnd.oci.image';

let directory: string;
let server: FaultServer;
const at = (...names: string[]): string => path.join(directory, ...names);
const digestOf = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
const hexOf = (digest: string): string => digest.slice('sha256:'.length);

beforeAll(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'erofs-nbd-index-'));
  server = await FaultServer.start();
  await writeFile(at('config.toml'), `[registry]\nhosts_dir = ""\ndocker_config = "${at('none.json')}"\n`);
});
afterAll(async () => {
  await server.close();
  await rm(directory, { recursive: true });
});

async function tarOf(bytes: Buffer): Promise<Buffer> {
  await writeFile(at('content'), bytes);
  await execa('tar', ['--format=pax', '-cf', at('content.tar'), '-C', directory, 'content']);
  return readFile(at('content.tar'));
}

interface Made {
  readonly layers: readonly { readonly digest: string; readonly diffId: string; readonly blobSize: number }[];
}

describe('index', () => {
  it('makes the index of a file, which inspect finds right, and makes it once', async () => {
    const tar = await tarOf(noise(2 * MIB, 1));
    const blob = gzipSync(tar);
    await writeFile(at('layer.tar.gz'), blob);
    const words = ['index', '--config', at('config.toml'), '--out', at('out'), at('layer.tar.gz')];
    const first = await erofsNbd([...words, '--json']);
    expect([first.exitCode, first.stderr]).toEqual([0, '']);
    const made = JSON.parse(first.stdout) as Made;
    expect(made.layers).toEqual([
      expect.objectContaining({ digest: digestOf(blob), diffId: digestOf(tar), blobSize: blob.length }),
    ]);
    const hex = hexOf(digestOf(blob));
    expect((await readdir(at('out', 'sha256'))).sort()).toEqual([
      `${hex}.erofs`,
      `${hex}.json`,
      `${hex}.zwin`,
    ]);
    const seen = await erofsNbd(['inspect', '--json', at('out', 'sha256', `${hex}.json`)]);
    expect(JSON.parse(seen.stdout)).toMatchObject({ kind: 'index of a layer', filesChecked: true });
    const again = await erofsNbd(words);
    expect([again.exitCode, again.stdout]).toEqual([
      0,
      `${at('layer.tar.gz')}: indexed, ${at('out', 'sha256', hex)}.*\n`,
    ]);
  });

  it('leaves nothing of what is no layer, and says so in one line', async () => {
    await writeFile(at('text'), 'no layer at all');
    const { exitCode, stderr } = await erofsNbd(['index', '--out', at('none'), at('text')]);
    expect(exitCode).toBe(1);
    expect(stderr).toMatch(/^erofs-nbd index: layer sha256:.* neither gzip nor a tar header\n$/);
    expect(await readdir(at('none'), { recursive: true }).catch(() => [])).not.toContainEqual(
      expect.stringMatching(/\.(erofs|zwin|json|resume|partial)/),
    );
    const pushed = await erofsNbd(['index', '--push', at('text')]);
    expect([pushed.exitCode, pushed.stderr.split('\n')[0]]).toEqual([
      2,
      'erofs-nbd index: --push: a file has no repository; name an image',
    ]);
  });

  it('interrupted by Ctrl-C ends at once without a word, and the next run goes on where it was', async () => {
    const tar = await tarOf(noise(72 * MIB, 2));
    const blob = gzipSync(tar, { level: 0 });
    const config = Buffer.from(
      JSON.stringify({
        architecture: 'amd64',
        os: 'linux',
        config: {},
        rootfs: { type: 'layers', diff_ids: [digestOf(tar)] },
      }),
    );
    const descriptor = (mediaType: string, bytes: Buffer) => ({
      mediaType,
      digest: server.addBlob(bytes),
      size: bytes.length,
    });
    const manifest = {
      schemaVersion: 2,
      mediaType: `${MEDIA}.manifest.v1+json`,
      config: descriptor(`${MEDIA}.config.v1+json`, config),
      layers: [descriptor(`${MEDIA}.layer.v1.tar+gzip`, blob)],
    };
    server.addManifest('1', manifest, manifest.mediaType);
    const image = `${server.host}/large:1`;
    const words = [
      'index',
      '--config',
      at('config.toml'),
      '--platform',
      'linux/amd64',
      '--out',
      at('resumed'),
    ];

    // From 64 MiB on there is silence: behind the first place to go on from, at 32 MiB.
    let silent = (): void => undefined;
    const stuck = new Promise<void>((resolve) => (silent = resolve));
    server.failAlways(digestOf(blob), ({ request, behave }) => {
      const range = requestedRange(request, blob.length);
      if (Array.isArray(range) && range[0] >= 64 * MIB) silent();
      else behave();
    });
    const child = spawn(process.execPath, [COMMAND, ...words, image], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    let said = '';
    child.stderr.setEncoding('utf8').on('data', (piece: string) => (said += piece));
    const closed = once(child, 'close') as Promise<[number | null, NodeJS.Signals | null]>;
    await Promise.race([stuck, closed]);
    // That place, with its window of 32 KiB, which does not compress. What came may be a while behind what was asked for.
    const { journal } = indexFiles(at('resumed'), digestOf(blob));
    await expect
      .poll(() => stat(journal).then(({ size }) => size), { timeout: patience(60_000) })
      .toBeGreaterThan(32_768);
    child.kill('SIGINT');
    expect([...(await closed), said]).toEqual([130, null, '']);

    server.behaveAgain();
    const before = server.requests.length;
    const { exitCode, stdout, stderr } = await erofsNbd([...words, '--json', image]);
    expect([exitCode, stderr]).toEqual([0, '']);
    expect((JSON.parse(stdout) as Made).layers[0]).toMatchObject({
      digest: digestOf(blob),
      diffId: digestOf(tar),
    });
    const starts = server.requests
      .slice(before)
      .filter(({ path: asked, headers }) => asked.includes(digestOf(blob)) && headers.range !== undefined)
      .map(({ headers }) => Number(/^bytes=(\d+)-/.exec(headers.range ?? '')?.[1]));
    // But for the first bytes, by which it sees what the layer is.
    expect(starts.filter((start) => start > 0).every((start) => start >= 30 * MIB)).toBe(true);
    expect(starts.length).toBeLessThan(48);
  });
});
