/**
 * Serves one FUSE file system that holds one file per layer: `layer-<layerId>`, read-only, for root alone.
 *
 * The kernel mounts EROFS on these files. Node ids follow from the layer's number, so the process after this one serves
 * the same nodes, which the kernel remembers. What the kernel asks for about a layer that this process was not told of
 * yet waits a while when there was a process before (its readers were blocked by the crash), and fails at once
 * otherwise.
 *
 * Files are opened for direct I/O: EROFS keeps the pages it reads, so a second copy in FUSE's page cache would be waste;
 * and a direct read fails as a whole when any part of it fails. Through the page cache it would come back short, and
 * kernels without the fix of 2026 ("erofs: set fileio bio failed in short read case") fill the rest with zeros. On
 * Linux 6.12 that holds for reads of EROFS up to `FUSE_MAX_READ` (its readahead is 128 KiB): longer ones are several
 * requests one after the other there, and side by side, failing together, on 6.18.
 *
 * The process that serves must never touch the mount itself: it would wait for its own answer.
 */
import { silentLogger, type Logger } from '../../daemon/log.js';
import type { BlobReader } from '../readers/blob-reader.js';
import { FuseChannel, FuseChannelError } from './fuse-channel.js';
import { FuseFile } from './fuse-file.js';
import {
  attributesReply,
  entryReply,
  errorReply,
  FUSE_MAJOR,
  FUSE_MINOR,
  FUSE_OUT_HEADER_LENGTH,
  FUSE_ROOT_ID,
  FuseErrno,
  type FuseErrnoNumber,
  FuseInitFlag,
  type FuseNode,
  FuseOpenFlag,
  FuseProtocolError,
  type FuseRequest,
  initReply,
  openReply,
  parseRequest,
  readdirReply,
  statfsReply,
  uniqueOfRefused,
} from './fuse-protocol.js';
import type { ReplyMemory } from './reply-memory.js';

export interface FuseServerOptions {
  /** Bounds the bytes of all reads under way. */
  readonly memory: ReplyMemory;
  /** After a crash: how long readers wait for a layer to be attached again before they get EIO. */
  readonly attachTimeoutMs?: number;
  readonly log?: Logger;
}

/** Longest read in bytes: the kernel's own limit (fs.fuse.max_pages_limit) unless an administrator raised it. */
export const FUSE_MAX_READ = 1024 * 1024;
/** Node ids of layers begin behind this one; below are the root directory and room for what may come. */
const NODE_ID_BASE = 16;
/** The kernel's reads of all layers together that are let out at a time. All of EROFS's reads are of this sort. */
const MAX_BACKGROUND = 512;
/** Sizes never change while a node exists. */
const ATTRIBUTE_SECONDS = 86_400;
/** Names come and go, and are looked up only to mount. */
const ENTRY_SECONDS = 0;
const DEFAULT_ATTACH_TIMEOUT_MS = 60_000;

const WANTED_FLAGS = [
  FuseInitFlag.ASYNC_READ,
  FuseInitFlag.ASYNC_DIO,
  FuseInitFlag.PARALLEL_DIROPS,
  FuseInitFlag.MAX_PAGES,
  FuseInitFlag.INIT_EXT,
  FuseInitFlag.HAS_RESEND,
];

/** Name of a layer's file below the mount point. */
export function fuseFileName(layerId: number): string {
  return `layer-${layerId}`;
}

function layerOfName(name: string): number | undefined {
  const digits = /^layer-([1-9][0-9]{0,15})$/.exec(name)?.[1];
  return digits === undefined ? undefined : Number(digits);
}

/** Requests about a layer that is not attached yet. */
interface Awaited {
  readonly requests: FuseRequest[];
  readonly timer: NodeJS.Timeout;
}

export class FuseServer {
  /** Resolves when the file system has been unmounted, or the connection was lost with that error. Never rejects. */
  readonly ended: Promise<FuseChannelError | undefined>;
  readonly #channel: FuseChannel;
  readonly #memory: ReplyMemory;
  readonly #attachTimeoutMs: number;
  readonly #log: Logger;
  readonly #scratch = Buffer.allocUnsafeSlow(FUSE_OUT_HEADER_LENGTH + FUSE_MAX_READ);
  readonly #files = new Map<number, FuseFile>();
  readonly #awaited = new Map<number, Awaited>();
  /** Layers that were waited for in vain, or taken away: nobody waits for them again. */
  readonly #givenUp = new Set<number>();
  #adopted: boolean;
  #resolveEnded: (error: FuseChannelError | undefined) => void = () => undefined;

  /**
   * Serves at once. The connection may be mounted before or after, by any process.
   *
   * @param descriptor open on /dev/fuse for reading and writing, becomes non-blocking; stays the caller's
   * @throws {FuseChannelError} when it is not a FUSE connection
   */
  constructor(descriptor: number, options: FuseServerOptions) {
    this.#memory = options.memory;
    this.#attachTimeoutMs = options.attachTimeoutMs ?? DEFAULT_ATTACH_TIMEOUT_MS;
    this.#log = options.log ?? silentLogger;
    this.ended = new Promise((resolve) => {
      this.#resolveEnded = resolve;
    });
    this.#channel = new FuseChannel(descriptor, {
      onRequest: (bytes) => this.#received(bytes),
      onEnd: (error) => this.#end(error),
    });
    this.#adopted = this.#channel.earlier !== 'fresh';
    if (this.#channel.earlier === 'lost') {
      this.#log.error(
        'this kernel (before 6.9) cannot repeat the reads that the process before this one left unanswered: their readers hang until they are killed',
      );
    }
  }

  /** True when a process before this one has served the connection, as far as is known. */
  get adopted(): boolean {
    return this.#adopted;
  }

  /** Layers with requests that wait for them to be attached. */
  get awaited(): number[] {
    return [...this.#awaited.keys()];
  }

  /** True when the file system is unmounted or the connection lost; a new one is needed then. */
  get hasEnded(): boolean {
    return this.#channel.ended;
  }

  /**
   * Adds a layer's file and answers what has waited for it.
   *
   * @param layerId a whole number > 0
   * @param reader stays the caller's
   * @param generation 0 to 2^31 - 1; the same for the same layer in every process, another for another layer that gets
   *   the number later: opens of the one must never read the other
   * @throws {Error} when the layer has a file
   */
  add(layerId: number, reader: BlobReader, generation: number): FuseFile {
    if (this.#files.has(layerId)) throw new Error(`layer ${layerId} has a FUSE file already`);
    let lastLogged = -Infinity;
    const file = new FuseFile({
      layerId,
      reader,
      generation,
      memory: this.#memory,
      scratch: this.#scratch,
      send: (message) => this.#send(message),
      onReadError: (error, offset, length) => {
        // The kernel may try each page of a failed read again: one line a second says it as well as hundreds.
        if (performance.now() - lastLogged < 1000) return;
        lastLogged = performance.now();
        this.#log.error({ layerId, offset, length, err: error }, 'a read failed: the reader gets EIO');
      },
    });
    this.#files.set(layerId, file);
    this.#givenUp.delete(layerId);
    const awaited = this.#awaited.get(layerId);
    if (awaited !== undefined) {
      this.#awaited.delete(layerId);
      clearTimeout(awaited.timer);
      for (const request of awaited.requests) this.#handle(request);
    }
    return file;
  }

  /** Takes a layer's file away; its readers get EIO. */
  remove(file: FuseFile): void {
    file.close();
    if (this.#files.get(file.layerId) === file) {
      this.#files.delete(file.layerId);
      this.#givenUp.add(file.layerId);
    }
  }

  /** Ends serving and leaves what is unanswered to the next process. The descriptor stays open. Idempotent. */
  async close(): Promise<void> {
    this.#abandon();
    await this.#channel.close();
    this.#resolveEnded(undefined);
  }

  #abandon(): void {
    for (const file of this.#files.values()) file.abandon();
    for (const { timer } of this.#awaited.values()) clearTimeout(timer);
    this.#awaited.clear();
  }

  #end(error: FuseChannelError | undefined): void {
    if (error !== undefined) this.#log.error({ err: error }, 'the FUSE connection cannot be read any more');
    this.#abandon();
    this.#resolveEnded(error);
  }

  #send(message: Buffer): void {
    try {
      this.#channel.send(message);
    } catch (error) {
      // No reason is known for this one. The kernel has ended the request, or still waits: then EIO ends it.
      this.#log.error({ err: error }, 'a FUSE reply was refused');
      const unique = message.readBigUInt64LE(8);
      if (message.length > FUSE_OUT_HEADER_LENGTH) this.#send(errorReply(unique, FuseErrno.EIO));
    }
  }

  #refuse(request: FuseRequest, errno: FuseErrnoNumber): void {
    this.#send(errorReply(request.unique, errno));
  }

  #received(bytes: Buffer): void {
    let request: FuseRequest;
    try {
      request = parseRequest(bytes);
    } catch (error) {
      if (!(error instanceof FuseProtocolError)) throw error;
      this.#log.error({ err: error }, 'a FUSE request was not understood');
      const unique = uniqueOfRefused(bytes);
      if (unique !== undefined) this.#send(errorReply(unique, FuseErrno.EINVAL));
      return;
    }
    this.#handle(request);
  }

  #handle(request: FuseRequest): void {
    switch (request.kind) {
      case 'read':
        return this.#read(request);
      case 'init':
        return this.#init(request);
      case 'lookup':
        return this.#lookup(request);
      case 'getattr':
        return this.#getattr(request);
      case 'open':
        return this.#open(request);
      case 'opendir':
        return request.nodeId === FUSE_ROOT_ID
          ? this.#send(openReply(request.unique, 0n, 0))
          : this.#refuse(request, FuseErrno.ENOTDIR);
      case 'readdir':
        return this.#readdir(request);
      case 'statfs':
        return this.#send(statfsReply(request.unique, this.#files.size));
      // Permissions are the kernel's business (default_permissions).
      case 'access':
      case 'done':
        return this.#refuse(request, FuseErrno.NONE);
      case 'unanswered':
        return;
      case 'change':
        return this.#refuse(request, FuseErrno.EROFS);
      case 'unknown':
        // Also extended attributes and FLUSH. The kernel remembers the answer for most of these and does not ask again.
        return this.#refuse(request, FuseErrno.ENOSYS);
    }
  }

  #init(request: FuseRequest & { kind: 'init' }): void {
    // Comes first and once: whoever held the connection before us has not served it.
    this.#adopted = false;
    if (request.major < FUSE_MAJOR) {
      this.#log.error({ major: request.major }, 'the kernel speaks a FUSE protocol before version 7');
      return this.#refuse(request, FuseErrno.EPROTO);
    }
    const flags = WANTED_FLAGS.filter((flag) => Math.floor(request.flags / flag) % 2 === 1);
    if (request.major === FUSE_MAJOR && !flags.includes(FuseInitFlag.HAS_RESEND)) {
      this.#log.warn(
        'this kernel (before 6.9) cannot repeat reads: readers will not survive the end of this process',
      );
    }
    this.#send(
      initReply(request.unique, {
        minor: Math.min(request.minor, FUSE_MINOR),
        flags: flags.reduce((sum, flag) => sum + flag, 0),
        maxReadahead: FUSE_MAX_READ,
        maxBackground: MAX_BACKGROUND,
        maxPages: FUSE_MAX_READ / 4096,
      }),
    );
  }

  #read(request: FuseRequest & { kind: 'read' }): void {
    if (request.nodeId === FUSE_ROOT_ID) return this.#refuse(request, FuseErrno.EISDIR);
    const file = this.#fileOf(request, request.nodeId - NODE_ID_BASE);
    if (file === undefined) return;
    if (request.handle !== BigInt(file.generation)) {
      // Opened when another layer had this number: its bytes are not ours.
      return this.#refuse(request, FuseErrno.EIO);
    }
    if (request.size > FUSE_MAX_READ) return this.#refuse(request, FuseErrno.EINVAL);
    file.read(request.unique, request.offset, request.size);
  }

  #lookup(request: FuseRequest & { kind: 'lookup' }): void {
    const layerId = layerOfName(request.name);
    if (request.nodeId !== FUSE_ROOT_ID || layerId === undefined) {
      return this.#refuse(request, FuseErrno.ENOENT);
    }
    const file = this.#fileOf(request, layerId);
    if (file === undefined) return;
    const { unique } = request;
    this.#send(entryReply(unique, nodeOf(file), file.generation, ENTRY_SECONDS, ATTRIBUTE_SECONDS));
  }

  #getattr(request: FuseRequest): void {
    if (request.nodeId === FUSE_ROOT_ID) {
      const root: FuseNode = { nodeId: FUSE_ROOT_ID, type: 'directory', size: 0 };
      return this.#send(attributesReply(request.unique, root, ATTRIBUTE_SECONDS));
    }
    const file = this.#fileOf(request, request.nodeId - NODE_ID_BASE);
    if (file !== undefined) this.#send(attributesReply(request.unique, nodeOf(file), ATTRIBUTE_SECONDS));
  }

  #open(request: FuseRequest & { kind: 'open' }): void {
    if (request.writes) return this.#refuse(request, FuseErrno.EROFS);
    if (request.nodeId === FUSE_ROOT_ID) return this.#refuse(request, FuseErrno.EISDIR);
    const file = this.#fileOf(request, request.nodeId - NODE_ID_BASE);
    if (file === undefined) return;
    // EROFS reads its metadata through the node's page cache. It is kept from one open to the next, but for the first:
    // an earlier file with this node id may have left something in it.
    // Closing must not wait for a server that may be dead: the process that is to start the next one may hold such a file,
    // and closes it on the way to exec.
    const flags = FuseOpenFlag.DIRECT_IO + FuseOpenFlag.NOFLUSH + (file.opened ? FuseOpenFlag.KEEP_CACHE : 0);
    file.opened = true;
    this.#send(openReply(request.unique, BigInt(file.generation), flags));
  }

  #readdir(request: FuseRequest & { kind: 'readdir' }): void {
    if (request.nodeId !== FUSE_ROOT_ID) return this.#refuse(request, FuseErrno.ENOTDIR);
    // An entry's node id is also its place in the listing, so that a listing in parts survives changes in between.
    const entries = [
      { nodeId: FUSE_ROOT_ID, type: 'directory' as const, name: '.', next: 1 },
      { nodeId: FUSE_ROOT_ID, type: 'directory' as const, name: '..', next: 2 },
      ...[...this.#files.values()]
        .map(nodeOf)
        .sort((one, other) => one.nodeId - other.nodeId)
        .map((node) => ({
          ...node,
          name: fuseFileName(node.nodeId - NODE_ID_BASE),
          next: node.nodeId,
        })),
    ];
    const rest = entries.filter(({ next }) => next > request.offset);
    this.#send(readdirReply(request.unique, rest, Math.min(request.size, FUSE_MAX_READ)));
  }

  /** The layer's file; when there is none, undefined, and the request is answered or waits for the layer. */
  #fileOf(request: FuseRequest, layerId: number): FuseFile | undefined {
    const file = this.#files.get(layerId);
    if (file !== undefined) return file;
    if (!this.#adopted || this.#givenUp.has(layerId) || layerId < 1) {
      this.#refuse(request, request.kind === 'lookup' ? FuseErrno.ENOENT : FuseErrno.EIO);
      return undefined;
    }
    const awaited = this.#awaited.get(layerId);
    if (awaited !== undefined) {
      awaited.requests.push(request);
    } else {
      const timer = setTimeout(() => this.#giveUp(layerId), this.#attachTimeoutMs);
      this.#awaited.set(layerId, { requests: [request], timer });
    }
    return undefined;
  }

  #giveUp(layerId: number): void {
    const requests = this.#awaited.get(layerId)?.requests ?? [];
    this.#awaited.delete(layerId);
    this.#givenUp.add(layerId);
    this.#log.error(
      { layerId, requests: requests.length, waitedMs: this.#attachTimeoutMs },
      'a layer in use was not attached again in time: its readers get EIO until it is (fuse.attach_timeout)',
    );
    for (const request of requests) this.#fileOf(request, layerId);
  }
}

function nodeOf(file: FuseFile): FuseNode {
  return { nodeId: file.layerId + NODE_ID_BASE, type: 'file', size: file.size };
}
