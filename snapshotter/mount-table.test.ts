import { describe, expect, it } from 'vitest';
import { mountTable, parseMountInfo } from './mount-table.js';

describe('the mount table', () => {
  it('reads the fields it needs, whatever optional fields stand between', () => {
    const text = [
      '36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue',
      '40 36 43:0 / /var/lib/erofs-nbd/layers/1/fs ro,noatime - erofs /dev/nbd0 ro,user_xattr',
      '',
    ].join('\n');
    expect(parseMountInfo(text)).toEqual([
      {
        id: 36,
        device: '98:0',
        mountPoint: '/mnt2',
        type: 'ext3',
        source: '/dev/root',
        superOptions: 'rw,errors=continue',
      },
      {
        id: 40,
        device: '43:0',
        mountPoint: '/var/lib/erofs-nbd/layers/1/fs',
        type: 'erofs',
        source: '/dev/nbd0',
        superOptions: 'ro,user_xattr',
      },
    ]);
  });

  it('gives back spaces, tabs, newlines and backslashes in names', () => {
    const [entry] = parseMountInfo('1 2 0:1 / /a\\040b\\011c\\012d\\134e rw - tmpfs my\\040source rw');
    expect(entry?.mountPoint).toBe('/a b\tc\nd\\e');
    expect(entry?.source).toBe('my source');
  });

  it('leaves out lines that are not of its form', () => {
    expect(parseMountInfo('nonsense\n1 2 0:1 / /x rw tmpfs\n')).toEqual([]);
  });

  it('finds the root file system of this machine', async () => {
    expect((await mountTable()).some(({ mountPoint }) => mountPoint === '/')).toBe(true);
  });
});
