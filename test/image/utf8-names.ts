/** The tiny image for formats that cannot say every name. */
import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { gunzipSync, gzipSync } from 'node:zlib';
import { execa } from 'execa';
import { digestOf, layerOfBytes, layersOf, type ComposedLayer } from './composed-image.js';
import { blobPath } from './layer-blob.js';
import type { Image } from './oci-layout.js';
import { ODD_NAMES } from './tiny-image.js';

/**
 * @param tiny of tar.gz layers
 * @param scratch an existing directory
 * @returns its layers, without the names that are no UTF-8: a table of contents in JSON cannot say those
 */
export async function withoutNamesOfBytes(tiny: Image, scratch: string): Promise<ComposedLayer[]> {
  const notUtf8 = ODD_NAMES.filter((name) => !Buffer.from(name.toString()).equals(name));
  const [base, ...others] = layersOf(tiny);
  const file = path.join(scratch, 'base.tar');
  const list = path.join(scratch, 'not-utf8');
  await writeFile(file, gunzipSync(await readFile(blobPath(tiny.layout, base?.blob.digest ?? ''))));
  await writeFile(list, Buffer.concat(notUtf8.map((name) => Buffer.concat([Buffer.from('./odd/'), name]))));
  await execa('tar', ['--delete', '-f', file, '-T', list]);
  const tar = await readFile(file);
  return [layerOfBytes(gzipSync(tar), digestOf(tar)), ...others];
}
