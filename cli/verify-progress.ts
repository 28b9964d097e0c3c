/** How a verification shows itself: a bar of the bytes that have been read on a terminal, nothing elsewhere. */
import { Presets, SingleBar } from 'cli-progress';
import { control } from '../proto/messages.js';
import { formatSize } from './quantities.js';

export interface VerifyProgress {
  show(layers: readonly control.VerifiedLayer.$Properties[]): void;
  /** Leaves the terminal as it should be. */
  close(): void;
}

export function openVerifyProgress(stream: NodeJS.WriteStream, quiet: boolean): VerifyProgress {
  if (quiet || !stream.isTTY) return { show: () => undefined, close: () => undefined };
  const shown = new SingleBar(
    { stream, format: '{bar} layer {value}/{total}  {what}', hideCursor: true },
    Presets.shades_classic,
  );
  let begun = false;
  return {
    show: (given) => {
      const layers = given.map((layer) => control.VerifiedLayer.create(layer));
      const done = layers.filter(({ state }) => state >= control.VerifyState.VERIFY_DONE).length;
      const payload = {
        what: `${formatSize(layers.reduce((sum, { checkedBytes }) => sum + checkedBytes, 0))} read`,
      };
      if (!begun) shown.start(layers.length, done, payload);
      begun = true;
      shown.update(done, payload);
    },
    close: () => {
      if (begun) shown.stop();
      begun = false;
    },
  };
}
