import { describe, expect, it } from 'vitest';
import { chainIdOf, chainIdOfSnapshot, checkChainId, LabelError, layerReference } from './layer-reference.js';

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

describe('the chain ID of a Prepare', () => {
  const [base, middle] = [digest('1'), digest('2')];

  it("is the diff ID of the lowest layer, and a digest of all below on the others, as the specification's", () => {
    expect(chainIdOf('', base)).toBe(base);
    // printf 'sha256:111…1 sha256:222…2' | sha256sum
    expect(chainIdOf(base, middle)).toBe(
      'sha256:9932074217c35353d2e03a3f5a86549f7c67bfeb0ba53e23d69f4d4c8f7958f5',
    );
  });

  it('must be what diff ID and parent make', () => {
    expect(() => checkChainId(base, '', base)).not.toThrow();
    expect(() => checkChainId(chainIdOf(base, middle), base, middle)).not.toThrow();
    expect(() => checkChainId(middle, '', base)).toThrow(LabelError);
    expect(() => checkChainId(middle, base, middle)).toThrow(chainIdOf(base, middle));
  });

  it('of a snapshot is its label, or the end of the name that containerd 1.x gives it', () => {
    const label = { 'containerd.io/snapshot.ref': middle };
    expect(chainIdOfSnapshot({ name: `k8s.io/7/${base}`, labels: label })).toBe(middle);
    expect(chainIdOfSnapshot({ name: `k8s.io/7/${base}`, labels: {} })).toBe(base);
    expect(chainIdOfSnapshot({ name: base, labels: {} })).toBe(base);
    expect(chainIdOfSnapshot({ name: `k8s.io/7/my-${base}`, labels: {} })).toBeUndefined();
    expect(chainIdOfSnapshot({ name: 'by-hand', labels: {} })).toBeUndefined();
  });

  it('is taken as it is where parent or diff ID are not known', () => {
    expect(() => checkChainId(middle, undefined, base)).not.toThrow();
    expect(() => checkChainId(middle, '', '')).not.toThrow();
  });
});
