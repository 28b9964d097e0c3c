/**
 * How a pull shows itself: a bar on a terminal, a line per layer elsewhere.
 */
import { Presets, SingleBar } from 'cli-progress';
import type { ImageLayer } from './image-documents.js';
import type { LayerOutcome, PullProgress } from './pull.js';
import { formatSize } from './quantities.js';

const OUTCOMES: Readonly<Record<LayerOutcome, string>> = {
  there: 'there already',
  lazy: 'served lazily',
  unpacked: 'downloaded and unpacked',
};

function nameOf({ descriptor }: ImageLayer): string {
  return `${descriptor.digest.slice(0, 'sha256:'.length + 12)} (${formatSize(descriptor.size)})`;
}

export interface ClosableProgress extends PullProgress {
  /** Leaves the terminal as it should be, however the pull ended. */
  close(): void;
}

export function openProgress(stream: NodeJS.WriteStream, quiet: boolean): ClosableProgress {
  if (quiet)
    return { begin: () => undefined, layer: () => undefined, done: () => undefined, close: () => undefined };
  return stream.isTTY ? bar(stream) : lines(stream);
}

function lines(stream: NodeJS.WritableStream): ClosableProgress {
  let count = 0;
  return {
    begin: (layers) => {
      count = layers.length;
    },
    layer: () => undefined,
    done: (index, layer, outcome, ms) => {
      const seconds = (ms / 1000).toFixed(1);
      stream.write(`layer ${index + 1}/${count} ${nameOf(layer)}: ${OUTCOMES[outcome]}, ${seconds} s\n`);
    },
    close: () => undefined,
  };
}

function bar(stream: NodeJS.WriteStream): ClosableProgress {
  const shown = new SingleBar(
    { stream, format: '{bar} {value}/{total} layers, {duration} s  {what}', hideCursor: true },
    Presets.shades_classic,
  );
  return {
    begin: (layers) => shown.start(layers.length, 0, { what: '' }),
    layer: (index, layer) => shown.update(index, { what: nameOf(layer) }),
    done: (index) => shown.update(index + 1, { what: '' }),
    close: () => shown.stop(),
  };
}
