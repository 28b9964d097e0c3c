/**
 * `erofs-nbd report`: of a container that has really run, and its page in a real browser.
 */
import { existsSync } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { erofsNbd } from '../command/run-command.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import type { Image } from '../image/oci-layout.js';
import type { Containerd } from '../stack/containerd.js';
import type { Registry } from '../stack/registry.js';
import { Stack } from '../stack/stack.js';
import { missingForSystemTests } from '../system/requirements.js';
import { Browser } from './browser.js';

const missing = await missingForSystemTests();

interface Report {
  readonly image: string;
  readonly container?: string;
  readonly layers: readonly {
    readonly status: { readonly layer: string; readonly deviceBytes: number; readonly fetchedBytes: number };
    readonly reads: readonly { readonly at: number; readonly offset: number; readonly length: number }[];
    readonly fetches: readonly {
      readonly offset: number;
      readonly length: number;
      readonly urgency: string;
    }[];
    readonly files: { readonly parts: readonly { file: string; start: number; end: number }[] } | string;
  }[];
}

describe.each(['erofs', 'tar+gzip'] as const)('a report of an image with %s layers', (format) => {
  let stack: Stack;
  let image: Image;
  let registry: Registry;
  let containerd: Containerd;
  let reference: string;
  let root: string;
  let config: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    image = await buildTinyImage({ format });
    stack = await Stack.create();
    registry = await stack.startRegistry();
    reference = await registry.push(image, 'tiny:latest');
    const snapshotter = await stack.startSnapshotter();
    root = snapshotter.plugin.root;
    containerd = await stack.startContainerd({ snapshotters: [stack.plugin()] });
    config = path.join(stack.directory, 'empty.toml');
    await writeFile(config, 'version = 1\n');
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
    const run = await containerd.ctr('run', '--rm', '--snapshotter', 'erofs-nbd', reference, 'first');
    expect(`${String(run.stdout)}\n`).toBe(TINY_GREETING);
  });
  afterAll(() => stack?.remove());

  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });
  const report = (...parameters: string[]) =>
    erofsNbd(['report', '--config', config, '--root', root, ...parameters], { env: containerd.environment });

  test('tells what the container read, by file, and what was fetched for it', async () => {
    const { stdout, stderr, exitCode } = await report('--json', reference);
    expect({ stderr, exitCode }).toEqual({ stderr: '', exitCode: 0 });
    const told = JSON.parse(stdout) as Report;
    expect(told.image).toBe(reference);
    expect(told.layers.map(({ status }) => status.layer)).toEqual(image.layers.map(({ digest }) => digest));
    const top = told.layers.at(-1);
    if (top === undefined || typeof top.files === 'string') throw new Error('no files are told');
    const motd = top.files.parts.filter(({ file }) => file === '/etc/motd');
    expect(motd.reduce((bytes, { start, end }) => bytes + end - start, 0)).toBe(TINY_GREETING.length);
    const isRead = (at: number): boolean =>
      top.reads.some(({ offset, length }) => offset <= at && at < offset + length);
    expect(motd.every(({ start, end }) => isRead(start) && isRead(end - 1))).toBe(true);
    for (const { status, reads, fetches } of told.layers) {
      for (const { at, offset, length } of reads) {
        expect(at).toBeGreaterThanOrEqual(0);
        expect(offset + length).toBeLessThanOrEqual(status.deviceBytes);
      }
      // Indexing a classic layer fetches before it is attached; what is recorded is what came after.
      const bytes = fetches.reduce((sum, { length }) => sum + length, 0);
      if (format === 'erofs') expect(bytes).toBe(status.fetchedBytes);
      else expect(bytes).toBeLessThanOrEqual(status.fetchedBytes);
    }
    if (format === 'erofs') expect(told.layers.some(({ fetches }) => fetches.length > 0)).toBe(true);
  });

  test('finds the image of a container, and says what it does not find', async () => {
    await containerd.ctr('container', 'create', '--snapshotter', 'erofs-nbd', reference, 'second');
    const { stdout, stderr } = await report('--json', 'second');
    expect(stderr).toBe('');
    const told = JSON.parse(stdout) as Report;
    expect({ ...told, layers: told.layers.length }).toMatchObject({
      image: reference,
      container: 'second',
      layers: image.layers.length,
    });
    await containerd.ctr('container', 'rm', 'second');
    const silent = await report('--address', path.join(stack.directory, 'none.sock'), 'second');
    expect(silent.exitCode).toBe(1);
    expect(silent.stderr).toContain('none.sock; is it running, and is that its socket (--address)?');
    const none = await report('third');
    expect(none.exitCode).toBe(1);
    expect(none.stderr).toBe(
      `erofs-nbd report: containerd has no image and no container "third" in namespace "${containerd.namespace}" (--namespace)\n`,
    );
  });

  test('is a page that a browser shows without a network, legible in both colour schemes', async () => {
    const page = path.join(stack.directory, 'report.html');
    const written = await report('-o', page, reference);
    expect(written).toMatchObject({ exitCode: 0, stderr: '' });
    expect(existsSync(page)).toBe(true);
    expect(await readFile(page, 'utf8')).not.toMatch(/<script|https?:\/\//);
    const browser = await Browser.start();
    try {
      await browser.send('Page.enable');
      await browser.send('Network.enable');
      await browser.send('Log.enable');
      for (const scheme of ['light', 'dark']) {
        await browser.send('Emulation.setEmulatedMedia', {
          features: [{ name: 'prefers-color-scheme', value: scheme }],
        });
        await browser.send('Page.navigate', { url: `file://${page}` });
        await expect
          .poll(() => browser.evaluate('document.readyState'), { timeout: 30_000 })
          .toBe('complete');
        expect(await browser.evaluate('document.querySelectorAll("svg.waterfall .lane").length')).toBe(
          image.layers.length,
        );
        expect(await browser.evaluate('document.body.innerText')).toContain('/etc/motd');
        expect(await browser.evaluate('document.documentElement.scrollWidth <= innerWidth')).toBe(true);
        const { background, least, worst } = await browser.evaluate<Legibility>(LEGIBILITY);
        expect(background > 0.5).toBe(scheme === 'light');
        // WCAG 2.1, 1.4.3: text has a contrast of at least 4.5 to 1.
        expect({ worst, enough: least >= 4.5 }).toEqual({ worst, enough: true });
        await keepScreenshot(browser, scheme);
      }
      const asked = browser.events
        .filter(({ method }) => method === 'Network.requestWillBeSent')
        .map(({ params }) => (params as { request: { url: string } }).request.url);
      expect(new Set(asked)).toEqual(new Set([`file://${page}`]));
      expect(browser.events.filter(({ method }) => method === 'Log.entryAdded')).toEqual([]);
    } finally {
      await browser.close();
    }
  });

  /** `REPORT_SCREENSHOTS=DIRECTORY` keeps what the browser shows. */
  async function keepScreenshot(browser: Browser, scheme: string): Promise<void> {
    const directory = process.env['REPORT_SCREENSHOTS'];
    if (directory === undefined) return;
    const { data } = (await browser.send('Page.captureScreenshot', { captureBeyondViewport: true })) as {
      data: string;
    };
    await writeFile(path.join(directory, `report-${format}-${scheme}.png`), Buffer.from(data, 'base64'));
  }
});

interface Legibility {
  /** Luminance of the page, from 0 to 1. */
  readonly background: number;
  /** Least contrast of a text with the page, and which text that is. */
  readonly least: number;
  readonly worst: string;
}

/** Contrast as WCAG 2.1 defines it, of every element that has a text of its own. */
const LEGIBILITY = `(() => {
  const channel = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((value) => channel(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  let least = Infinity, worst = '';
  for (const element of document.body.querySelectorAll('*')) {
    if (element.closest('title, style')) continue;
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim() !== '')) continue;
    const style = getComputedStyle(element);
    const ink = luminance(element instanceof SVGElement ? style.fill : style.color);
    const contrast = (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
    if (contrast < least) { least = contrast; worst = element.outerHTML.slice(0, 200); }
  }
  return { background: page, least, worst };
})()`;
