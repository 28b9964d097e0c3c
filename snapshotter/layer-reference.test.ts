import { describe, expect, it } from 'vitest';
import { LabelError, layerReference } from './layer-reference.js';

const digest = (digit: string) => `sha256:${digit.repeat(64)}`;
const labels = {
  'containerd.io/snapshot.ref': digest('c'),
  'containerd.io/snapshot/cri.image-ref': '127.0.0.1:5000/demo:latest',
  'containerd.io/snapshot/cri.layer-digest': digest('a'),
  'containerd.io/snapshot/cri.manifest-digest': digest('b'),
};

describe('the labels of a Prepare', () => {
  it('name image, manifest and layer', () => {
    expect(layerReference(labels)).toEqual({
      imageRef: '127.0.0.1:5000/demo:latest',
      manifestDigest: digest('b'),
      layerDigest: digest('a'),
      diffId: '',
    });
  });

  it('may leave the manifest out, and may bring the diff ID', () => {
    const reference = layerReference({
      ...labels,
      'containerd.io/snapshot/cri.manifest-digest': '',
      'containerd.io/snapshot/diff-id': digest('d'),
    });
    expect(reference).toMatchObject({ manifestDigest: '', diffId: digest('d') });
  });

  it('without image or layer name nothing', () => {
    expect(layerReference({})).toBeUndefined();
    expect(layerReference({ 'containerd.io/snapshot/cri.image-ref': 'x' })).toBeUndefined();
    expect(layerReference({ 'containerd.io/snapshot/cri.layer-digest': digest('a') })).toBeUndefined();
  });

  it.each([
    'sha256:short',
    `sha256:${'A'.repeat(64)}`,
    `md5:${'a'.repeat(32)}`,
    `${digest('a')} `,
    '../../etc/passwd',
  ])('with the layer digest %j are refused, naming label and value', (value) => {
    const refused = () => layerReference({ ...labels, 'containerd.io/snapshot/cri.layer-digest': value });
    expect(refused).toThrow(LabelError);
    expect(refused).toThrow(/cri\.layer-digest=.*expected sha256: and 64 lower-case hex digits/);
  });

  it.each(['user:hunter2@registry.example/team/app', 'https://user:hunter2@registry.example/team/app'])(
    'are refused when the reference holds a login, which is not shown: %#',
    (imageRef) => {
      const refused = { ...labels, 'containerd.io/snapshot/cri.image-ref': imageRef };
      expect(() => layerReference(refused)).toThrow(LabelError);
      expect(() => layerReference(refused)).not.toThrow(/hunter2/);
    },
  );
});
