/**
 * Builds an image and says where it is:
 *
 *     node dist/test/image/build-image.js [debian|tiny] [erofs|erofs-lz4hc|tar|tar+gzip] [--new-media-type]
 */
import { buildDebianImage } from './debian-image.js';
import { EROFS_LAYER, EROFS_LAYER_NEW, LAYER_FORMATS, type LayerFormat } from './layer-blob.js';
import { layerBytes } from './oci-layout.js';
import { buildTinyImage } from './tiny-image.js';

function isFormat(text: string): text is LayerFormat {
  return LAYER_FORMATS.some((format) => format === text);
}

const words = process.argv.slice(2).filter((word) => !word.startsWith('--'));
const [which = 'debian', format = 'erofs'] = words;
if ((which !== 'debian' && which !== 'tiny') || !isFormat(format)) {
  console.error(`usage: build-image [debian|tiny] [${LAYER_FORMATS.join('|')}] [--new-media-type]`);
  process.exit(2);
}
const options = {
  format,
  erofsMediaType: process.argv.includes('--new-media-type') ? EROFS_LAYER_NEW : EROFS_LAYER,
};
const image =
  which === 'tiny'
    ? await buildTinyImage(options)
    : await buildDebianImage(options, (message) => console.error(message));
console.log(JSON.stringify({ ...image, bytes: layerBytes(image) }, null, 2));
