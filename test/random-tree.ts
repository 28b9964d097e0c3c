/** Random layers for tests: every kind of file, awkward names, sizes at the edges of blocks. The seed decides all. */
import { Inode, type LayerTree, MODE } from '../blobserve/layer/tree.js';

/** Numbers from 0 to below `below`, the same ones for the same seed (a linear congruential generator). */
export function seeded(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

export interface RandomLayer {
  readonly tree: LayerTree;
  /** Bytes of the tar in which the files' data would lie. */
  readonly tarSize: number;
}

const XATTRS = [
  'user.a',
  'user.b',
  'trusted.overlay.opaque',
  'security.capability',
  'security.selinux',
  'system.posix_acl_access',
  'system.posix_acl_default',
  'system.nfs4_acl',
  'nonsense',
];

/** A version number and no entries. */
const EMPTY_ACL = Buffer.from([2, 0, 0, 0]);

export function randomLayer(seed: number, files: number): RandomLayer {
  const random = seeded(seed);
  const root = new Inode(0, MODE.DIRECTORY | 0o755);
  root.children = new Map();
  const directories = [root];
  const others: Inode[] = [];
  let tarSize = 0;
  for (let index = 1; index <= files; index++) {
    const parent = directories[random(directories.length)] ?? root;
    const name = randomName(random);
    if (parent.children?.has(name) === true || name === '.' || name === '..') continue;
    const link = others[random(others.length * 8)];
    if (link !== undefined) {
      parent.children?.set(name, link);
      continue;
    }
    const inode = new Inode(index, random(0o10000));
    inode.uid = random(3) === 0 ? random(2 ** 32) : random(2000);
    inode.gid = random(70000);
    inode.mtime = random(5) === 0 ? -random(2 ** 40) : random(2 ** 32);
    inode.mtimeNanoseconds = random(2) * random(1_000_000_000);
    for (let count = random(4) === 0 ? random(5) : 0; count > 0; count--) {
      inode.xattrs ??= new Map();
      const attribute = XATTRS[random(XATTRS.length)] ?? 'user.a';
      const value = Buffer.alloc(random(random(4) === 0 ? 900 : 30), 0x61 + random(3));
      // The kernel reads ACLs itself, and does not open what has one that is none.
      inode.xattrs.set(attribute, attribute.startsWith('system.posix') ? EMPTY_ACL : value);
    }
    const type = random(10);
    if (type < 2) {
      inode.mode |= MODE.DIRECTORY;
      inode.children = new Map();
      directories.push(inode);
    } else {
      others.push(inode);
      if (type === 2) {
        inode.mode |= MODE.SYMLINK;
        inode.target = 't'.repeat(1 + random(random(3) === 0 ? 4095 : 600));
      } else if (type === 3) {
        inode.mode |= [MODE.CHAR, MODE.BLOCK, MODE.FIFO, MODE.SOCKET][random(4)] ?? MODE.CHAR;
        inode.major = random(0x1000);
        inode.minor = random(0x100000);
      } else {
        inode.mode |= MODE.FILE;
        inode.size = random(4) === 0 ? 0 : random(random(5) === 0 ? 2 ** 33 : 2000);
        inode.dataOffset = tarSize;
        tarSize += Math.ceil(inode.size / 512) * 512;
      }
    }
    parent.children?.set(name, inode);
  }
  return { tree: { root, indexes: files + 1 }, tarSize };
}

function randomName(random: (below: number) => number): string {
  const length = 1 + random([3, 20, 255][random(3)] ?? 3);
  let name = '';
  for (let i = 0; i < length; i++) {
    const byte = random(4) === 0 ? 1 + random(255) : 0x2d + random(60);
    name += String.fromCharCode(byte === 0x2f ? 0x30 : byte);
  }
  return name;
}
