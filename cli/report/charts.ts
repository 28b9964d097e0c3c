/**
 * The pictures of a report, as SVG without a script: colours are the page's (page.ts), numbers are in each mark's title.
 */
import { formatDuration, formatSize } from '../quantities.js';
import type { LayerRecord } from './gather.js';
import { html, type Html } from './html.js';
import type { Range } from './reading.js';
import { timeAxis } from './time-axis.js';

const WIDTH = 1000;
const LEFT = 150;
const LANE = 84;
/** Below a lane: when readers waited. */
const WAITS = 10;
const GAP = 18;
const AXIS = 26;
/** So that the smallest is seen. */
const LEAST = 2.5;

const PURPOSE = {
  wanted: 'a reader waited',
  readahead: 'readahead',
  ahead: 'ahead of a start',
  background: 'in the background',
} as const;

/** Time from left to right, the bytes of each layer from top to bottom: every range that was fetched. */
export function waterfall(layers: readonly LayerRecord[], names: readonly string[]): Html {
  const axis = timeAxis([
    ...layers.flatMap(({ fetches }) => fetches.map(({ at, ms }) => [at, at + ms] as const)),
    ...layers.flatMap(({ reads }) => reads.map(({ at, wait }) => [at, at + wait] as const)),
  ]);
  const x = (ms: number): number => LEFT + axis.position(ms) * (WIDTH - LEFT - 4);
  const width = (at: number, ms: number): number => Math.max(LEAST, x(at + ms) - x(at));
  const step = LANE + WAITS + GAP;
  const height = layers.length * step + AXIS;
  const lanes = layers.map(({ status, fetches, reads }, index) => {
    const top = index * step;
    const y = (offset: number): number => (LANE * offset) / Math.max(1, status.blobBytes);
    const ranges = fetches.map(({ at, ms, offset, length, urgency, failed }) => {
      const what = `${failed ? 'failed, ' : ''}${PURPOSE[urgency]}: ${formatSize(length)} at ${formatSize(offset)}`;
      return html`<rect
        class="${failed ? 'failed' : urgency}"
        x="${x(at)}"
        y="${top + y(offset)}"
        width="${width(at, ms)}"
        height="${Math.max(LEAST, y(length))}"
        ><title>${what}, ${formatDuration(at)} + ${formatDuration(ms)}</title></rect
      >`;
    });
    const waits = reads
      .filter(({ wait }) => wait >= 0.5)
      .map(
        ({ at, wait, count, length }) =>
          html`<rect
            class="wait"
            x="${x(at)}"
            y="${top + LANE + 2}"
            width="${width(at, wait)}"
            height="${WAITS - 2}"
            ><title>
              ${count === 1 ? 'a read' : `${count} reads`} of ${formatSize(length)} waited
              ${formatDuration(wait)}
            </title></rect
          >`,
      );
    return html`<text class="name" x="0" y="${top + 14}">${names[index] ?? ''}</text
      ><text class="note" x="0" y="${top + 30}">${formatSize(status.blobBytes)}, ${status.kind}</text
      ><text class="note" x="0" y="${top + LANE + WAITS}">readers waited</text
      ><rect
        class="lane"
        x="${LEFT}"
        y="${top}"
        width="${WIDTH - LEFT}"
        height="${LANE}"
      />${ranges}${waits}`;
  });
  const ticks = axis.ticks.map(({ at, ms }) => {
    const place = LEFT + at * (WIDTH - LEFT - 4);
    return html`<line class="tick" x1="${place}" x2="${place}" y1="0" y2="${height - AXIS}" /><text
        class="note"
        text-anchor="middle"
        x="${place}"
        y="${height - 8}"
        >${ms === 0 ? '0' : formatDuration(ms)}</text
      >`;
  });
  const pauses = axis.pauses.map(({ at, ms }) => {
    const place = LEFT + at * (WIDTH - LEFT - 4);
    return html`<line class="pause" x1="${place}" x2="${place}" y1="0" y2="${height - AXIS}"
      ><title>${formatDuration(ms)} without a read or a fetch</title></line
    >`;
  });
  return html`<svg
    class="waterfall"
    viewBox="0 0 ${WIDTH} ${height}"
    role="img"
    aria-label="Ranges fetched of each layer over time"
  >
    ${ticks}${lanes}${pauses}
  </svg>`;
}

const CELLS = 60;

/** A bar of cells, darker where more was read. @param ranges from 0 to 1, sorted and disjoint */
export function strip(ranges: readonly Range[], label: string): Html {
  const shares = new Array<number>(CELLS).fill(0);
  for (const [start, end] of ranges) {
    for (
      let cell = Math.floor(start * CELLS);
      cell < Math.min(CELLS, Math.max(end * CELLS, start * CELLS + 1e-9));
      cell++
    ) {
      const part = Math.min(end * CELLS, cell + 1) - Math.max(start * CELLS, cell);
      shares[cell] = (shares[cell] ?? 0) + Math.max(0, part);
    }
  }
  const cells = shares.map((share, cell) =>
    share <= 0
      ? html``
      : html`<rect
          class="read"
          x="${cell * 4}"
          y="0"
          width="4"
          height="12"
          opacity="${0.2 + 0.8 * Math.min(1, share)}"
        />`,
  );
  return html`<svg class="strip" viewBox="0 0 ${CELLS * 4} 12" role="img" aria-label="${label}">
    <rect class="lane" x="0" y="0" width="${CELLS * 4}" height="12" />
    ${cells}
  </svg>`;
}
