import { describe, expect, it } from 'vitest';
import { MetadataError } from '../metadata/errors.js';
import { idMapping } from './id-mapping.js';

const UID = 'containerd.io/snapshot/uidmapping';
const GID = 'containerd.io/snapshot/gidmapping';

function refusalOf(labels: Record<string, string>): string {
  try {
    idMapping(labels);
  } catch (error) {
    if (error instanceof MetadataError && error.code === 'invalid_argument') return error.message;
    throw error;
  }
  return 'none';
}

describe('the user namespace of a container', () => {
  it('is none without labels', () => {
    expect(idMapping({})).toBeUndefined();
    expect(idMapping({ [UID]: '', 'containerd.io/snapshot.ref': 'sha256:1' })).toBeUndefined();
  });

  it('says who root is outside of it, whichever range that is in', () => {
    const labels = { [UID]: '0:100000:65536', [GID]: '1:200001:10,0:3:1' };
    expect(idMapping(labels)).toEqual({
      uids: '0:100000:65536',
      gids: '1:200001:10,0:3:1',
      rootUid: 100_000,
      rootGid: 3,
    });
    const all = '0:0:4294967295';
    expect(idMapping({ [UID]: all, [GID]: all })).toMatchObject({ rootUid: 0, rootGid: 0 });
  });

  it('is refused when it cannot be one, with the label and what is wrong with it', () => {
    const good = '0:100000:65536';
    expect(refusalOf({ [UID]: good })).toContain(`${GID}=""`);
    expect(refusalOf({ [GID]: good })).toContain(`${UID}=""`);
    expect(refusalOf({ [UID]: '1:100000:65536', [GID]: good })).toContain('does not map 0');
    for (const bad of [
      '0:1000:0',
      '0:1000',
      '0:1000:5,',
      '0:-1:5',
      'a:b:c',
      '0:4294967295:1',
      '0:0:4294967296',
      '0:1:1,lowerdir=/:1:1',
    ]) {
      expect(refusalOf({ [UID]: good, [GID]: bad })).toContain('expected container:host:count');
    }
  });
});
