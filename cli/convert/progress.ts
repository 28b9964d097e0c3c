/**
 * How converting shows itself: a bar of the bytes that have been read on a terminal, a line per layer elsewhere.
 */
import { Presets, SingleBar } from 'cli-progress';
import { formatSize } from '../quantities.js';
import type { ConvertedLayer, LayerOutcome } from './convert-layer.js';

export interface ConvertProgress {
  begin(bytes: number, layers: number): void;
  /** So many more bytes of layers were read. */
  read(bytes: number): void;
  layer(layer: ConvertedLayer): void;
  /** Leaves the terminal as it should be. */
  close(): void;
}

const OUTCOMES: Readonly<Record<LayerOutcome, string>> = {
  converted: 'converted',
  there: 'there already',
  kept: 'native already',
};

export function openConvertProgress(stream: NodeJS.WriteStream, quiet: boolean): ConvertProgress {
  if (quiet)
    return { begin: () => undefined, read: () => undefined, layer: () => undefined, close: () => undefined };
  return stream.isTTY ? bar(stream) : lines(stream);
}

function lines(stream: NodeJS.WritableStream): ConvertProgress {
  let [done, of] = [0, 0];
  return {
    begin: (_bytes, layers) => void (of = layers),
    read: () => undefined,
    layer: ({ source, outcome, digest, size }) => {
      const made = outcome === 'kept' ? '' : `, ${digest.slice(0, 19)} (${formatSize(size)})`;
      const what = `${source.digest.slice(0, 19)} (${formatSize(source.size)})`;
      stream.write(`layer ${++done}/${of} ${what}: ${OUTCOMES[outcome]}${made}\n`);
    },
    close: () => undefined,
  };
}

function bar(stream: NodeJS.WriteStream): ConvertProgress {
  const shown = new SingleBar(
    {
      stream,
      format: '{bar} {percentage} % of {size}, {eta_formatted} left  {what}',
      hideCursor: true,
      etaBuffer: 50,
    },
    Presets.shades_classic,
  );
  let [read, done, of] = [0, 0, 0];
  return {
    begin: (bytes, layers) => {
      of = layers;
      shown.start(bytes, 0, { size: formatSize(bytes), what: `layer 1/${layers}` });
    },
    read: (bytes) => shown.update((read += bytes)),
    layer: () => shown.update({ what: ++done === of ? 'image' : `layer ${done + 1}/${of}` }),
    close: () => shown.stop(),
  };
}
