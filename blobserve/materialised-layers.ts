/**
 * Materialised layers: of a tar.gz layer whose blob is here as a whole and was verified, what it unpacks to is written once
 * beside the blob, and served from there, so that nothing is inflated any more (materialise.ts says what is written).
 *
 * It is a convenience: made in the background by a thread that gives way to all others, one layer at a time, and only where
 * twice its size is free; the first thing that goes when room is needed (cache-space.ts). The way through the blob stays open
 * below it, so a file that goes, or cannot be read, is nobody's error. A file that an earlier process made is read and
 * compared with its digests before it is used.
 */
import { rm, stat } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import pLimit from 'p-limit';
import type { Logger } from '../daemon/log.js';
import { endsOnceStarted } from './end-thread.js';
import type { LayerIndexRecord } from './layer/index/layer-index.js';
import type { MaterialiseRequest } from './materialise.js';
import type { MaterialiseReply, MaterialiseTask } from './materialise-thread.js';
import { counted } from './metrics.js';
import {
  type CachedFiles,
  materialisedPath,
  removeAbandoned,
  unfinishedPath,
} from './readers/cache-directory.js';
import type { CacheSpace, MaterialisedKeeper } from './readers/cache-space.js';
import { FileReader } from './readers/file.js';
import { cachePaths } from './readers/span-store.js';
import type { SwitchReader } from './readers/switch.js';
import { abortable } from './registry/transport.js';

/** Milliseconds between two looks whether there is room, or the blob is whole again. */
const RETRY_MS = 30_000;

export interface MaterialisedLayersOptions {
  /** Directory of all cache files. */
  readonly cacheDirectory: string;
  /** False: none is made or used, and those that are there go. */
  readonly enabled: boolean;
  /** Milliseconds between a layer's attach and the first thing done for it. */
  readonly delayMs: number;
  readonly retryMs?: number;
  readonly space: Pick<CacheSpace, 'reserve' | 'keepMaterialised'>;
  /** Does a task; default: on a thread. Rejects when it fails, or the signal ends it. */
  readonly run?: (task: MaterialiseTask, signal: AbortSignal) => Promise<void>;
  readonly log: Logger;
}

/** A layer that is served, in gzip. */
export interface MaterialisableLayer {
  readonly record: LayerIndexRecord;
  /** File of the tarindex. */
  readonly tarindex: string;
  readonly device: SwitchReader;
  /** Resolves when all of the blob is here and nothing about it is in doubt; it may be evicted afterwards. */
  readonly whenWhole: () => Promise<void>;
  readonly isWhole: () => boolean;
}

interface Attached {
  readonly device: SwitchReader;
  readonly ended: AbortController;
}

export class MaterialisedLayers implements MaterialisedKeeper {
  readonly #options: MaterialisedLayersOptions;
  /** By digest. */
  readonly #attached = new Map<string, Set<Attached>>();
  /** Each takes a core, and a disk's time. */
  readonly #turn = pLimit(1);
  /** Ends what is being made. */
  #making: { readonly controller: AbortController; readonly done: Promise<void> } | undefined;

  constructor(options: MaterialisedLayersOptions) {
    this.#options = options;
    options.space.keepMaterialised(this);
  }

  /**
   * Sees to it that the layer is materialised some day, and served from the file.
   *
   * @returns ends that, before the device is closed
   */
  add(layer: MaterialisableLayer): () => void {
    const { digest } = layer.record;
    if (!this.#options.enabled) {
      this.#remove(digest).catch((error: unknown) =>
        this.#options.log.warn({ layer: digest, err: error }, 'a materialised layer cannot be deleted'),
      );
      return () => undefined;
    }
    const attached = { device: layer.device, ended: new AbortController() };
    const { signal } = attached.ended;
    const all = this.#attached.get(digest) ?? new Set<Attached>();
    this.#attached.set(digest, all.add(attached));
    this.#look(layer, signal).catch((error: unknown) => {
      if (signal.aborted) return;
      counted.materialised.add('failed');
      this.#options.log.warn(
        { layer: digest, err: error },
        'the layer is not materialised; it is inflated where it is read',
      );
    });
    return () => {
      attached.ended.abort();
      all.delete(attached);
      if (all.size === 0 && this.#attached.get(digest) === all) this.#attached.delete(digest);
    };
  }

  /**
   * Reads all of what a layer was unpacked to, and compares it with its digests.
   *
   * @param keep also when it is wrong; otherwise it is deleted, and reads go on through the blob
   * @returns undefined when there is none
   */
  async verify(
    record: LayerIndexRecord,
    tarindex: string,
    keep: boolean,
    signal: AbortSignal,
  ): Promise<{ readonly bytes: number; readonly problem?: string } | undefined> {
    const file = this.#file(record.digest);
    const there = await stat(file).catch(() => undefined);
    if (there === undefined) return undefined;
    const [blob] = cachePaths(this.#options.cacheDirectory, record.digest);
    try {
      await this.#run({ record, blob, tarindex, file, task: 'check' }, signal);
      return { bytes: there.size };
    } catch (error) {
      signal.throwIfAborted();
      // It may have gone to make room.
      if ((await stat(file).catch(() => undefined)) === undefined) return undefined;
      counted.materialised.add('failed');
      if (!keep) await this.#remove(record.digest);
      return { bytes: there.size, problem: (error as Error).message };
    }
  }

  async shrink(blobs: readonly CachedFiles[], wanted: number): Promise<number> {
    if (this.#making !== undefined) {
      this.#making.controller.abort();
      await this.#making.done;
    }
    let freed = 0;
    const lastRead = ({ digest }: CachedFiles): number =>
      Math.max(0, ...[...(this.#attached.get(digest) ?? [])].map(({ device }) => device.lastReadMs));
    for (const { digest, materialisedBytes } of [...blobs].sort((a, b) => lastRead(a) - lastRead(b))) {
      if (freed >= wanted) break;
      try {
        await this.#remove(digest);
      } catch (error) {
        this.#options.log.warn({ layer: digest, err: error }, 'a materialised layer cannot be deleted');
        continue;
      }
      freed += materialisedBytes;
      counted.materialised.add('evicted');
      counted.evicted.bytes += materialisedBytes;
      this.#options.log.info({ layer: digest, bytes: materialisedBytes }, 'evicted a materialised layer');
    }
    return freed;
  }

  /** The layer is not materialised again before it is attached again. */
  async #remove(digest: string): Promise<void> {
    for (const { device, ended } of this.#attached.get(digest) ?? []) {
      ended.abort();
      await device.switchBack();
    }
    await rm(this.#file(digest), { force: true });
  }

  #file(digest: string): string {
    return materialisedPath(cachePaths(this.#options.cacheDirectory, digest)[0]);
  }

  async #look(layer: MaterialisableLayer, signal: AbortSignal): Promise<void> {
    const { delayMs, retryMs = RETRY_MS } = this.#options;
    await delay(delayMs, undefined, { signal, ref: false });
    for (;;) {
      await abortable(layer.whenWhole(), signal);
      if (await this.#turn(async () => !signal.aborted && (await this.#try(layer, signal)))) return;
      await delay(retryMs, undefined, { signal, ref: false });
    }
  }

  /** @returns false: it cannot be done now, but perhaps later */
  async #try(layer: MaterialisableLayer, signal: AbortSignal): Promise<boolean> {
    const { log } = this.#options;
    const { record, tarindex, device } = layer;
    const [blob] = cachePaths(this.#options.cacheDirectory, record.digest);
    const file = this.#file(record.digest);
    const request: MaterialiseRequest = { record, blob, tarindex, file };
    const startedAt = performance.now();
    const found = await this.#isRight(request, signal);
    const what = found ? 'found' : await this.#make(request, layer.isWhole, signal);
    if (what === undefined) return false;
    const reader = await FileReader.open({ path: file, size: record.deviceSize });
    try {
      signal.throwIfAborted();
      device.switchTo(reader, (error) => {
        counted.materialised.add('failed');
        log.warn(
          { layer: record.digest, err: error },
          'a materialised layer cannot be read; it is inflated again',
        );
        this.#remove(record.digest).catch((reason: unknown) =>
          log.warn({ file, err: reason }, 'it cannot be deleted'),
        );
      });
    } catch (error) {
      await reader.close();
      throw error;
    }
    counted.materialised.add(what);
    const ms = Math.round(performance.now() - startedAt);
    log.info({ layer: record.digest, bytes: record.deviceSize, what, ms }, 'layer is served materialised');
    return true;
  }

  /** Whether there is one that can be used; another is deleted. */
  async #isRight(request: MaterialiseRequest, signal: AbortSignal): Promise<boolean> {
    const there = await stat(request.file).catch(() => undefined);
    if (there === undefined) return false;
    try {
      await this.#run({ ...request, task: 'check' }, signal);
      return true;
    } catch (error) {
      signal.throwIfAborted();
      this.#options.log.warn(
        { layer: request.record.digest, err: error },
        'a materialised layer is not used',
      );
      counted.materialised.add('failed');
      await rm(request.file, { force: true });
      return false;
    }
  }

  async #make(
    request: MaterialiseRequest,
    isWhole: () => boolean,
    signal: AbortSignal,
  ): Promise<'made' | undefined> {
    const reservation = this.#options.space.reserve(request.record.deviceSize);
    if (reservation === undefined) return undefined;
    const controller = new AbortController();
    const both = AbortSignal.any([signal, controller.signal]);
    const making = this.#run({ ...request, task: 'make' }, both).then(
      () => {
        reservation.taken();
        return 'made' as const;
      },
      async (error: unknown) => {
        // A thread that was ended leaves it.
        await removeAbandoned(unfinishedPath(request.file)).catch(() => undefined);
        reservation.released();
        signal.throwIfAborted();
        // Room was needed, or parts of the blob were evicted under it.
        if (controller.signal.aborted || !isWhole()) return undefined;
        throw error;
      },
    );
    this.#making = {
      controller,
      done: making.then(
        () => undefined,
        () => undefined,
      ),
    };
    try {
      return await making;
    } finally {
      this.#making = undefined;
    }
  }

  #run(task: MaterialiseTask, signal: AbortSignal): Promise<void> {
    return (this.#options.run ?? runOnThread)(task, signal);
  }
}

async function runOnThread(task: MaterialiseTask, signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  const worker = new Worker(new URL('./materialise-thread.js', import.meta.url), { workerData: task });
  const end = endsOnceStarted(worker);
  worker.unref();
  try {
    await abortable(
      new Promise<void>((resolve, reject) => {
        worker.on('message', (reply: MaterialiseReply) => {
          if (reply === 'done') resolve();
          else if (reply !== 'started') reject(new Error(reply.failed));
        });
        worker.once('error', reject);
        worker.once('exit', (code) => reject(new Error(`the thread that materialises ended with ${code}`)));
      }),
      signal,
    );
  } finally {
    await end();
  }
}
