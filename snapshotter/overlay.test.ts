import { describe, expect, it } from 'vitest';
import { snapshotMounts, type OverlayInput } from './overlay.js';

const directory = '/r/snapshots/7';

describe('the mounts of a snapshot', () => {
  it('without a parent are a bind of its own files', () => {
    expect(snapshotMounts({ kind: 'active', directory, lower: [], options: ['index=off'] })).toEqual([
      { type: 'bind', source: '/r/snapshots/7/fs', target: '', options: ['rw', 'rbind'] },
    ]);
    expect(snapshotMounts({ kind: 'view', directory, lower: [], options: [] })[0]?.options).toEqual([
      'ro',
      'rbind',
    ]);
  });

  it('of an active one with parents are an overlay with upper and work directory', () => {
    const lower = ['/r/layers/2/fs', '/r/snapshots/1/fs'];
    expect(snapshotMounts({ kind: 'active', directory, lower, options: ['index=off'] })).toEqual([
      {
        type: 'overlay',
        source: 'overlay',
        target: '',
        options: [
          'index=off',
          'workdir=/r/snapshots/7/work',
          'upperdir=/r/snapshots/7/fs',
          'lowerdir=/r/layers/2/fs:/r/snapshots/1/fs',
        ],
      },
    ]);
  });

  it('of a view of one parent are a read-only bind of it: overlay wants two lower layers', () => {
    expect(
      snapshotMounts({ kind: 'view', directory, lower: ['/r/layers/2/fs'], options: ['index=off'] }),
    ).toEqual([{ type: 'bind', source: '/r/layers/2/fs', target: '', options: ['ro', 'rbind'] }]);
  });

  it('have a layer that the image repeats once, where it is topmost', () => {
    const lower = ['/a', '/b', '/a'];
    expect(snapshotMounts({ kind: 'active', directory, lower, options: [] })[0]?.options.at(-1)).toBe(
      'lowerdir=/a:/b',
    );
    expect(snapshotMounts({ kind: 'view', directory, lower: ['/a', '/a'], options: [] })[0]?.source).toBe(
      '/a',
    );
  });

  it('of a view of several parents are an overlay without an upper', () => {
    const [mount] = snapshotMounts({ kind: 'view', directory, lower: ['/a', '/b'], options: ['index=off'] });
    expect(mount?.options).toEqual(['index=off', 'lowerdir=/a:/b']);
  });

  it('of a container in a user namespace name it, where there is anything below to be seen as its users', () => {
    const mapping = { uids: '0:1000:10', gids: '0:2000:10', rootUid: 1000, rootGid: 2000 };
    const options = (input: Pick<OverlayInput, 'kind' | 'lower'>): readonly string[] | undefined =>
      snapshotMounts({ ...input, directory, options: ['index=off'], mapping })[0]?.options;
    const mapped = ['uidmap=0:1000:10', 'gidmap=0:2000:10'];
    expect(options({ kind: 'active', lower: ['/a'] })).toEqual([
      ...mapped,
      'index=off',
      'workdir=/r/snapshots/7/work',
      'upperdir=/r/snapshots/7/fs',
      'lowerdir=/a',
    ]);
    expect(options({ kind: 'view', lower: ['/a'] })).toEqual([...mapped, 'ro', 'rbind']);
    expect(options({ kind: 'active', lower: [] })).toEqual(['rw', 'rbind']);
  });
});
