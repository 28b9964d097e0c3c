/**
 * How a prefetch shows itself: a bar of bytes on a terminal, a line for each layer that is done elsewhere.
 */
import { Presets, SingleBar } from 'cli-progress';
import { control } from '../proto/messages.js';
import { formatSize } from './quantities.js';

export interface PrefetchProgress {
  show(layers: readonly control.PrefetchedLayer.$Properties[]): void;
  /** Leaves the terminal as it should be. */
  close(): void;
}

const { PrefetchState } = control;

const SAID: Readonly<Record<number, string>> = {
  [PrefetchState.PREFETCH_DONE]: 'here',
  [PrefetchState.PREFETCH_LEFT_OUT]: 'not served lazily: downloaded when the image is pulled',
};

export function openPrefetchProgress(stream: NodeJS.WriteStream, quiet: boolean): PrefetchProgress {
  if (quiet) return { show: () => undefined, close: () => undefined };
  return stream.isTTY ? bar(stream) : lines(stream);
}

function lines(stream: NodeJS.WritableStream): PrefetchProgress {
  const said = new Set<number>();
  return {
    show: (layers) => {
      for (const [index, layer] of layers.entries()) {
        const { layerDigest, size, state } = control.PrefetchedLayer.create(layer);
        const outcome = SAID[state];
        if (outcome === undefined || said.has(index)) continue;
        said.add(index);
        const name = layerDigest.slice(0, 'sha256:'.length + 12);
        stream.write(`layer ${index + 1}/${layers.length} ${name} (${formatSize(size)}): ${outcome}\n`);
      }
    },
    close: () => undefined,
  };
}

function bar(stream: NodeJS.WriteStream): PrefetchProgress {
  const shown = new SingleBar(
    { stream, format: '{bar} {percentage} % of {size}  {what}', hideCursor: true },
    Presets.shades_classic,
  );
  let begun = false;
  return {
    show: (given) => {
      const layers = given
        .map((layer) => control.PrefetchedLayer.create(layer))
        .filter(({ state }) => state !== PrefetchState.PREFETCH_LEFT_OUT);
      const total = layers.reduce((sum, { size }) => sum + size, 0);
      const cached = layers.reduce((sum, { cachedBytes }) => sum + cachedBytes, 0);
      const payload = { size: formatSize(total), what: what(layers) };
      if (!begun) shown.start(total, cached, payload);
      else shown.setTotal(total);
      begun = true;
      shown.update(cached, payload);
    },
    close: () => {
      if (begun) shown.stop();
      begun = false;
    },
  };
}

function what(layers: readonly control.PrefetchedLayer[]): string {
  const states = layers.map(({ state }) => state);
  if (states.includes(PrefetchState.PREFETCH_FETCHING)) return '';
  if (states.includes(PrefetchState.PREFETCH_GIVING_WAY)) return 'waiting: containers read from the registry';
  return states.includes(PrefetchState.PREFETCH_PREPARING) ? 'verifying, indexing' : '';
}
