/**
 * Being told by the event loop that a descriptor can be read, for descriptors that are neither sockets nor pipes
 * (/dev/fuse): libuv's uv_poll, which Node has and does not show.
 *
 * Node exports libuv's functions to native code, which is how its addons are meant to use them. The alternative,
 * `fs.read` on a blocking descriptor, holds one of libuv's few threads for as long as nothing comes in, and waits behind
 * whatever else they are doing.
 */
import { isMainThread } from 'node:worker_threads';
import koffi from 'koffi';

// <uv.h>
const UV_POLL = 8; // uv_handle_type, unchanged since libuv 1.0
const UV_READABLE = 1; // uv_poll_event

/** libuv stops watching a descriptor that has failed; it is looked at again after so long. */
const RETRY_MS = 5;

interface LibUv {
  readonly loop: unknown;
  readonly handleSize: number;
  readonly init: (loop: unknown, handle: bigint, descriptor: number) => number;
  readonly start: (handle: bigint, events: number, callback: bigint) => number;
  readonly close: (handle: bigint, callback: bigint) => void;
  readonly onPoll: bigint;
  readonly onClose: bigint;
}

let libUv: LibUv | undefined;
/** By address of the uv_poll_t, what libuv calls back with. */
const watches = new Map<bigint, ReadableWatch>();
const closing = new Map<bigint, () => void>();

function openLibUv(): LibUv {
  if (!isMainThread) {
    throw new Error(
      'descriptors can be watched from the main thread only: its event loop is the default one',
    );
  }
  const node = koffi.load(null);
  const pollCallback = koffi.pointer(koffi.proto(null, 'void', ['void *', 'int', 'int']));
  const closeCallback = koffi.pointer(koffi.proto(null, 'void', ['void *']));
  const defaultLoop = node.func('void *uv_default_loop()') as () => unknown;
  const handleSize = node.func('size_t uv_handle_size(int type)') as (type: number) => number;
  const onPoll = (handle: bigint, status: number) => watches.get(handle)?.ring(status);
  const onClose = (handle: bigint) => {
    const closed = closing.get(handle);
    closing.delete(handle);
    closed?.();
  };
  return {
    loop: defaultLoop(),
    handleSize: Number(handleSize(UV_POLL)),
    init: node.func('int uv_poll_init(void *loop, void *handle, int fd)') as LibUv['init'],
    start: node.func('uv_poll_start', 'int', ['void *', 'int', pollCallback]) as LibUv['start'],
    close: node.func('uv_close', 'void', ['void *', closeCallback]) as LibUv['close'],
    onPoll: koffi.register(onPoll, pollCallback),
    onClose: koffi.register(onClose, closeCallback),
  };
}

export class ReadableWatch {
  readonly #uv: LibUv;
  /** The uv_poll_t: libuv's from init until it has called back from close. */
  readonly #handle: bigint;
  #scheduled = false;
  #stopped = false;
  #retry: NodeJS.Timeout | undefined;
  #closed: Promise<void> | undefined;

  /**
   * Watches at once, and keeps the process alive, until `close()`.
   *
   * @param descriptor becomes non-blocking; stays the caller's, who must not close it before `close()` has resolved
   * @param onReadable called in its own turn of the event loop, again and again while there is something to read; also
   *   every few milliseconds while the descriptor is in a failed state, which a read of it then tells
   * @throws {Error} in a worker thread, or when the descriptor cannot be watched
   */
  constructor(
    descriptor: number,
    private readonly onReadable: () => void,
  ) {
    this.#uv = libUv ??= openLibUv();
    this.#handle = koffi.alloc('uint8_t', this.#uv.handleSize) as bigint;
    const refused = this.#uv.init(this.#uv.loop, this.#handle, descriptor);
    if (refused !== 0) {
      koffi.free(this.#handle);
      throw new Error(`descriptor ${descriptor} cannot be watched: libuv error ${refused}`);
    }
    watches.set(this.#handle, this);
    this.#start();
  }

  #start(): void {
    this.#stopped = false;
    this.#uv.start(this.#handle, UV_READABLE, this.#uv.onPoll);
  }

  /**
   * Called by libuv, outside of any call of Node's: nothing may be done here but leave a note. The note is read later in
   * the same turn of the event loop, where promises and exceptions work as everywhere.
   */
  ring(status: number): void {
    if (status < 0) this.#stopped = true;
    if (this.#scheduled || this.#closed !== undefined) return;
    this.#scheduled = true;
    setImmediate(() => {
      this.#scheduled = false;
      if (this.#closed !== undefined) return;
      if (this.#stopped) this.#retry = setTimeout(() => this.#start(), RETRY_MS);
      this.onReadable();
    });
  }

  /** Stops watching; resolves when the descriptor may be closed. Idempotent. */
  close(): Promise<void> {
    this.#closed ??= new Promise((resolve) => {
      clearTimeout(this.#retry);
      watches.delete(this.#handle);
      closing.set(this.#handle, () => {
        // Not in libuv's callback: it still holds the memory.
        setImmediate(() => {
          koffi.free(this.#handle);
          resolve();
        });
      });
      this.#uv.close(this.#handle, this.#uv.onClose);
    });
    return this.#closed;
  }
}
