/**
 * Where things are below the root directory: said once, since both daemons, the command and the tests look there.
 */
import path from 'node:path';

export interface Layout {
  readonly root: string;
  /** One directory per snapshot, named by its number; `fs` in it holds its files. */
  readonly snapshots: string;
  /** One directory per layer that is served, named by its number; mounted at `fs` in it. */
  readonly layers: string;
  /** Blobs, as far as they have been fetched, by digest. */
  readonly cache: string;
  /** Indexes of tar and tar.gz layers, by digest of the blob. */
  readonly index: string;
  /** What containers were recorded to read first, by digest of the image's manifest. */
  readonly prefetch: string;
  /** Digests of the spans of blobs that were complete and right once; kept when the cache goes. */
  readonly digests: string;
  /** Where the FUSE file system with one file per layer is mounted. */
  readonly fuse: string;
  /** Blobserve's control socket. */
  readonly controlSocket: string;
  /** Which process is, or was last, started as blobserve. */
  readonly blobserveProcess: string;
  /** Who holds the FUSE connection besides the daemons. */
  readonly fuseKeeper: string;
  /** Files that take the place of what a registry or this node would give, by layer; only there for mounts by hand. */
  readonly givenFiles: string;
}

export function layout(root: string): Layout {
  const below = (name: string): string => path.join(root, name);
  return {
    root,
    snapshots: below('snapshots'),
    layers: below('layers'),
    cache: below('cache'),
    index: below('index'),
    prefetch: below('prefetch'),
    digests: below('digests'),
    fuse: below('fuse'),
    controlSocket: below('blobserve.sock'),
    blobserveProcess: below('blobserve.json'),
    fuseKeeper: below('fuse-keeper.json'),
    givenFiles: below('given-files.json'),
  };
}

/**
 * @param controlSocket where the data plane that serves is found
 * @param pid of one that stands by, or is starting
 * @returns where that one answers
 */
export function standbySocket(controlSocket: string, pid: number): string {
  return `${controlSocket}.${pid}`;
}
