/**
 * How indexing shows itself: a bar of bytes on a terminal, a line per layer elsewhere.
 */
import { Presets, SingleBar } from 'cli-progress';
import { type BlobReader, ReadError } from '../blobserve/readers/blob-reader.js';
import { formatSize } from './quantities.js';

export interface IndexProgress {
  /** A reader whose reads are shown, and end when the signal is aborted. */
  metered(reader: BlobReader, signal: AbortSignal): BlobReader;
  /** A layer is done, the so manyth of so many. */
  done(digest: string, layer: number, of: number): void;
  /** Leaves the terminal as it should be. */
  close(): void;
}

export function openIndexProgress(stream: NodeJS.WriteStream, quiet: boolean): IndexProgress {
  const bar = !quiet && stream.isTTY ? openBar(stream) : undefined;
  return {
    metered: (reader, signal) => new MeteredReader(reader, signal, (bytes) => bar?.add(bytes), bar?.expect),
    done: (digest, layer, of) => {
      if (bar !== undefined) bar.show(`${layer}/${of} layers`);
      else if (!quiet) stream.write(`layer ${layer}/${of} ${digest.slice(0, 19)}: indexed\n`);
    },
    close: () => bar?.close(),
  };
}

interface Bar {
  readonly expect: (bytes: number) => void;
  add(bytes: number): void;
  show(what: string): void;
  close(): void;
}

function openBar(stream: NodeJS.WriteStream): Bar {
  const shown = new SingleBar(
    {
      stream,
      format: '{bar} {percentage} % of {size}, {eta_formatted} left  {what}',
      hideCursor: true,
      etaBuffer: 50,
    },
    Presets.shades_classic,
  );
  let [total, read, begun] = [0, 0, false];
  return {
    expect: (bytes) => {
      total += bytes;
      if (begun) shown.setTotal(total);
      else shown.start(total, 0, { size: formatSize(total), what: '' });
      begun = true;
      shown.update(read, { size: formatSize(total) });
    },
    add: (bytes) => {
      read += bytes;
      shown.update(read);
    },
    show: (what) => shown.update(read, { what }),
    close: () => {
      if (begun) shown.stop();
    },
  };
}

/** Tells how far a blob has been read: what an earlier run had read counts when this one begins behind it. */
class MeteredReader implements BlobReader {
  readonly #next: BlobReader;
  readonly #signal: AbortSignal;
  readonly #onBytes: (bytes: number) => void;
  readonly #end = (): void => void this.close().catch(() => undefined);
  #reached = 0;

  constructor(
    next: BlobReader,
    signal: AbortSignal,
    onBytes: (bytes: number) => void,
    expect: ((bytes: number) => void) | undefined,
  ) {
    this.#next = next;
    this.#signal = signal;
    this.#onBytes = onBytes;
    signal.addEventListener('abort', this.#end, { once: true });
    expect?.(next.size);
  }

  get size(): number {
    return this.#next.size;
  }

  async read(target: Buffer, offset: number): Promise<void> {
    if (this.#signal.aborted) throw new ReadError('closed', 'interrupted');
    await this.#next.read(target, offset);
    const end = offset + target.length;
    if (end > this.#reached) this.#onBytes(end - this.#reached);
    this.#reached = Math.max(this.#reached, end);
  }

  readNow(): boolean {
    return false;
  }

  close(): Promise<void> {
    this.#signal.removeEventListener('abort', this.#end);
    return this.#next.close();
  }
}
