/**
 * Uploads an OCI layout to a registry on loopback. OCI distribution specification, "Pushing Blobs", "Pushing Manifests".
 */
import { createReadStream } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { request } from 'undici';
import { blobPath, type Blob } from '../image/layer-blob.js';
import type { Image } from '../image/oci-layout.js';

/**
 * @param registry `127.0.0.1:port`, plain HTTP
 * @param name `repository:tag`
 */
export async function pushImage(image: Image, registry: string, name: string): Promise<void> {
  const [repository = '', tag = 'latest'] = name.split(':');
  const base = `http://${registry}/v2/${repository}`;
  for (const blob of [...image.layers, image.config]) await pushBlob(image.layout, blob, base);
  const manifest = await readFile(blobPath(image.layout, image.manifest.digest));
  const put = await request(`${base}/manifests/${tag}`, {
    method: 'PUT',
    headers: { 'content-type': image.manifest.mediaType },
    body: manifest,
  });
  await expectStatus(put, 201, `manifest ${image.manifest.digest}`);
}

async function pushBlob(layout: string, blob: Blob, base: string): Promise<void> {
  const head = await request(`${base}/blobs/${blob.digest}`, { method: 'HEAD' });
  await head.body.dump();
  if (head.statusCode === 200) return;
  const start = await request(`${base}/blobs/uploads/`, {
    method: 'POST',
    headers: { 'content-length': '0' },
  });
  await expectStatus(start, 202, `upload of ${blob.digest}`);
  const location = start.headers['location'];
  if (typeof location !== 'string') throw new Error(`upload of ${blob.digest}: no place to upload to`);
  const target = new URL(location, base);
  target.searchParams.set('digest', blob.digest);
  const put = await request(target, {
    method: 'PUT',
    headers: { 'content-type': 'application/octet-stream', 'content-length': String(blob.size) },
    body: createReadStream(blobPath(layout, blob.digest), { highWaterMark: 1 << 20 }),
    // The registry hashes the whole blob before it answers.
    headersTimeout: 300_000,
  });
  await expectStatus(put, 201, `blob ${blob.digest}, ${blob.size} bytes`);
}

async function expectStatus(
  answer: Awaited<ReturnType<typeof request>>,
  wanted: number,
  what: string,
): Promise<void> {
  const text = await answer.body.text();
  if (answer.statusCode !== wanted)
    throw new Error(`${what}: the registry said ${answer.statusCode}: ${text}`);
}
