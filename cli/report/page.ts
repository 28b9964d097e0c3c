/**
 * The page of `erofs-nbd report`: one file that needs no network and no script, in the colours the reader has chosen.
 */
import { formatDuration, formatShare, formatSize } from '../quantities.js';
import { strip, waterfall } from './charts.js';
import type { ImageRecord, LayerRecord } from './gather.js';
import { html, Html } from './html.js';
import {
  filesRead,
  METADATA,
  prefetchList,
  total,
  usedRanges,
  type FileReading,
  type Range,
} from './reading.js';

export interface ReportSubject {
  readonly image: string;
  readonly container?: string;
  /** Layers of the image, attached or not. */
  readonly layers: number;
  /** Version of the program. */
  readonly version: string;
}

/** Rows of a table. */
const ROWS = 40;

const STYLE = new Html(`
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #5b6470; --line: #d5dae0; --lane: #f1f3f6;
  --wanted: #c2410c; --readahead: #2563eb; --ahead: #7c3aed; --background: #94a3b8; --wait: #b91c1c; --read: #0f766e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e7eaee; --soft: #9aa5b1; --line: #343b44;
  --lane: #1f242a; --wanted: #fb923c; --readahead: #60a5fa; --ahead: #a78bfa; --background: #6b7a8d; --wait: #f87171; --read: #2dd4bf; } }
body { margin: 2rem auto; max-width: 64rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
p, td, th, dd { color: var(--ink); } .note, caption, dt, th { color: var(--soft); fill: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 1rem 0; }
dl div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; } dt { font-size: .8rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); font-weight: normal; }
td.number, th.number { text-align: right; white-space: nowrap; } td.path { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; } svg.strip { width: 15rem; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg text.note { fill: var(--soft); }
.lane { fill: var(--lane); } .tick { stroke: var(--line); } .pause { stroke: var(--soft); stroke-dasharray: 3 3; stroke-width: 2; }
.wanted { fill: var(--wanted); } .readahead { fill: var(--readahead); } .ahead { fill: var(--ahead); } .background { fill: var(--background); }
.wait { fill: var(--wait); } .read { fill: var(--read); } .failed { fill: none; stroke: var(--wait); }
.key span { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem; vertical-align: -1px; }
.key .wanted { background: var(--wanted); } .key .readahead { background: var(--readahead); } .key .ahead { background: var(--ahead); }
.key .background { background: var(--background); } .key .wait { background: var(--wait); }
`);

interface Layer {
  readonly name: string;
  readonly record: LayerRecord;
  readonly used: readonly Range[];
  /** In the order of their first reads; undefined when the names cannot be told. */
  readonly files: readonly FileReading[] | undefined;
}

/** The whole page. */
export function reportPage(subject: ReportSubject, image: ImageRecord): string {
  const layers = image.layers.map((record, index): Layer => {
    const { files, reads, status } = record;
    return {
      name: `${index + 1}  ${status.layer.replace(/^sha256:/, '').slice(0, 12)}`,
      record,
      used: usedRanges(reads),
      files: typeof files === 'string' ? undefined : filesRead(files.parts, reads),
    };
  });
  const title = subject.container ?? subject.image;
  const page = html`<!doctype html>
    <html lang="en">
      <head>
        <meta charset="utf-8" />
        <meta name="viewport" content="width=device-width, initial-scale=1" />
        <meta http-equiv="content-security-policy" content="default-src 'none'; style-src 'unsafe-inline'" />
        <title>What was read of ${title}</title>
        <style>
          ${STYLE}
        </style>
      </head>
      <body>
        <h1>What was read of ${title}</h1>
        <p class="note">
          ${subject.container === undefined ? '' : `image ${subject.image}, `}from
          ${new Date(image.beganAt).toISOString()}, erofs-nbd ${subject.version}
        </p>
        ${summary(subject, layers)}${timeline(layers)}${heatMaps(layers)}${firstFiles(layers)}${prefetch(layers)}
      </body>
    </html>`;
  return `${page.text}\n`;
}

function fact(name: string, value: string, note: string): Html {
  return html`<div>
    <dt>${name}</dt>
    <dd>${value}</dd>
    <dt>${note}</dt>
  </div>`;
}

function summary(subject: ReportSubject, layers: readonly Layer[]): Html {
  const sum = (of: (layer: Layer) => number): number => layers.reduce((all, layer) => all + of(layer), 0);
  const blobs = sum(({ record }) => record.status.blobBytes);
  const devices = sum(({ record }) => record.status.deviceBytes);
  const fetched = sum(({ record }) => record.status.fetchedBytes);
  const requests = sum(({ record }) => record.status.requests);
  const used = sum((layer) => total(layer.used));
  const reads = sum(({ record }) => record.reads.reduce((all, { count }) => all + count, 0));
  const waited = layers.flatMap(({ record }) => record.reads).filter(({ wait }) => wait >= 0.5);
  const longest = waited.reduce((most, { wait }) => Math.max(most, wait), 0);
  const leftOut = sum(({ record }) => record.leftOut.reads + record.leftOut.fetches);
  return html`<dl>
      ${fact('layers', `${layers.length} of ${subject.layers}`, 'attached and served')}
      ${fact('fetched', formatSize(fetched), `${formatShare(share(fetched, blobs))} of the image's ${formatSize(blobs)}, in ${requests} requests`)}
      ${fact('read', formatSize(used), `${formatShare(share(used, devices))} of the layers' ${formatSize(devices)}, in ${reads} reads`)}
      ${fact('readers waited', `${waited.length} times`, `at most ${formatDuration(longest)}`)}
    </dl>
    ${leftOut === 0 ? html`` : html`<p class="note">The record holds the first reads and fetches of each layer; ${leftOut} more came later.</p>`}`;
}

function share(part: number, whole: number): number | undefined {
  return whole > 0 ? part / whole : undefined;
}

function timeline(layers: readonly Layer[]): Html {
  return html`<h2>What was fetched when</h2>
    <p>
      Each mark is one range of a layer, from when it was asked for until it was here: left to right the time,
      top to bottom the place in the layer. A dashed line is a pause.
    </p>
    <p class="key note">
      <span class="wanted"></span>a reader waited<span class="readahead"></span>readahead<span
        class="ahead"
      ></span
      >ahead of a start<span class="background"></span>in the background<span class="wait"></span>how long
      readers waited
    </p>
    ${waterfall(
      layers.map(({ record }) => record),
      layers.map(({ name }) => name),
    )}`;
}

function heatMaps(layers: readonly Layer[]): Html {
  const sections = layers.map(({ name, record, used, files }) => {
    const { deviceBytes } = record.status;
    const ranges = used.map(([start, end]): Range => [start / deviceBytes, end / deviceBytes]);
    const head = html`<h3>Layer ${name}</h3>
      ${strip(ranges, 'which parts of the layer were read')}
      <p class="note">
        ${`${formatSize(total(used))} of ${formatSize(deviceBytes)} read${filesNote(record.files)}`}
      </p>`;
    const largest = [...(files ?? [])].sort((a, b) => b.readBytes - a.readBytes);
    return files === undefined || files.length === 0 ? head : html`${head}${fileTable(largest)}`;
  });
  return html`<h2>Which parts were read</h2>
    <p>
      What is coloured was read: first the whole layer, then its files, those of which most was read first.
    </p>
    ${sections}`;
}

function filesNote(files: LayerRecord['files']): string {
  if (typeof files === 'string') return `; its files cannot be told: ${files}`;
  return files.cut ? '; not all of its files are known' : '';
}

function fileTable(files: readonly FileReading[]): Html {
  const rows = files.slice(0, ROWS).map(
    ({ path, size, readBytes, ranges }) =>
      html`<tr>
        <td class="path">${path}</td>
        <td class="number">${formatSize(readBytes)}</td>
        <td class="number">${path === METADATA ? '' : formatShare(readBytes / size)}</td>
        <td>${path === METADATA ? html`` : strip(ranges, `which parts of ${path} were read`)}</td>
      </tr>`,
  );
  return html`<table>
    <thead>
      <tr>
        <th>file</th>
        <th class="number">read</th>
        <th class="number">of it</th>
        <th>where</th>
      </tr>
    </thead>
    <tbody>
      ${rows}
    </tbody>
    ${more(files.length)}
  </table>`;
}

function more(rows: number): Html {
  return rows > ROWS
    ? html`<caption>
        the first ${ROWS} of ${rows}
      </caption>`
    : html``;
}

function firstFiles(layers: readonly Layer[]): Html {
  const all = layers
    .flatMap(({ name, files }) => (files ?? []).map((file) => ({ name, file })))
    .filter(({ file }) => file.path !== METADATA)
    .sort((a, b) => a.file.first - b.file.first);
  const rows = all.slice(0, ROWS).map(
    ({ name, file }, index) =>
      html`<tr>
        <td class="number">${index + 1}</td>
        <td class="path">${file.path}</td>
        <td>${name}</td>
        <td class="number">${formatDuration(file.first)}</td>
        <td class="number">${formatSize(file.readBytes)}</td>
        <td class="number">${file.wait < 0.5 ? '' : formatDuration(file.wait)}</td>
      </tr>`,
  );
  return html`<h2>Files in the order of their first reads</h2>
    <table>
      <thead>
        <tr>
          <th></th>
          <th>file</th>
          <th>layer</th>
          <th class="number">after</th>
          <th class="number">read</th>
          <th class="number">waited</th>
        </tr>
      </thead>
      <tbody>
        ${rows}
      </tbody>
      ${more(all.length)}
    </table>`;
}

function prefetch(layers: readonly Layer[]): Html {
  const lists = layers.map(({ name, record }) => ({ name, list: prefetchList(record.fetches) }));
  const rows = lists.map(
    ({ name, list }) =>
      html`<tr>
        <td>${name}</td>
        <td class="number">${list.requests}</td>
        <td class="number">${list.ranges.length}</td>
        <td class="number">${formatSize(list.bytes)}</td>
      </tr>`,
  );
  return html`<h2>What could have been prefetched</h2>
    <p>
      The ranges that were fetched for readers, joined where they are close together: what a list would hold
      that has them fetched ahead of the reads, in the order in which they were wanted.
    </p>
    <table>
      <thead>
        <tr>
          <th>layer</th>
          <th class="number">requests</th>
          <th class="number">ranges</th>
          <th class="number">bytes</th>
        </tr>
      </thead>
      <tbody>
        ${rows}
      </tbody>
    </table>`;
}
