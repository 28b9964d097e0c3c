import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, describe, expect, it } from 'vitest';
import { parseReference } from './reference.js';
import { RegistryClient } from './registry-client.js';

const TYPE = 'application/vnd.example.index';
const SUBJECT = `sha256:${'ab'.repeat(32)}`;
const INDEX = 'application/vnd.oci.image.index.v1+json';

interface Page {
  readonly entries?: number;
  readonly link?: string;
  /** Never answered. */
  readonly silent?: true;
}

let server: Server | undefined;
let client: RegistryClient | undefined;
afterEach(async () => {
  await client?.close();
  server?.closeAllConnections();
  await new Promise((resolve) => server?.close(resolve));
});

/** A registry that has these pages, and how often it was asked. */
async function start(page: (number: number) => Page): Promise<{ host: string; asked: string[] }> {
  const asked: string[] = [];
  server = createServer((request, response) => {
    const url = new URL(request.url ?? '', 'http://registry');
    if (!url.pathname.includes('/referrers/')) {
      response.writeHead(200).end();
      return;
    }
    asked.push(url.pathname + url.search);
    const { entries = 1, link, silent } = page(Number(url.searchParams.get('page') ?? '0'));
    if (silent) return;
    const manifests = Array.from({ length: entries }, (_, i) => ({
      mediaType: 'application/vnd.oci.image.manifest.v1+json',
      digest: `sha256:${(asked.length * 100_000 + i).toString(16).padStart(64, '0')}`,
      size: 100,
      artifactType: TYPE,
    }));
    response.writeHead(200, { 'content-type': INDEX, ...(link !== undefined && { link }) });
    response.end(JSON.stringify({ schemaVersion: 2, mediaType: INDEX, manifests }));
  });
  const listening = server;
  await new Promise<void>((resolve) => listening.listen(0, '127.0.0.1', resolve));
  return { host: `127.0.0.1:${(listening.address() as AddressInfo).port}`, asked };
}

function list(host: string, signal?: AbortSignal) {
  client = new RegistryClient();
  return client.referrers(parseReference(`${host}/image`), SUBJECT, TYPE, signal);
}

describe('a list of referrers', () => {
  it('is read page after page', async () => {
    const next = (number: number): string =>
      `</v2/image/referrers/${SUBJECT}?page=${number + 1}>; rel="next"`;
    const { host, asked } = await start((number) => (number < 3 ? { entries: 10, link: next(number) } : {}));
    expect(await list(host)).toHaveLength(31);
    expect(asked).toHaveLength(4);
    expect(asked[0]).toContain(`artifactType=${encodeURIComponent(TYPE)}`);
  });

  it('with pages without end is not used', async () => {
    const { host, asked } = await start(() => ({ link: '<?page=7>; rel=next' }));
    await expect(list(host)).rejects.toThrow(/more than 16 pages/);
    expect(asked).toHaveLength(17);
  });

  it('of ten thousand entries is not used', async () => {
    const { host } = await start(() => ({ entries: 10_000 }));
    await expect(list(host)).rejects.toThrow(/4096/);
  });

  it('of ten thousand entries in pages is not used', async () => {
    const { host, asked } = await start((number) => ({
      entries: 1000,
      ...(number < 10 && { link: `<?page=${number + 1}>; rel="next"` }),
    }));
    await expect(list(host)).rejects.toThrow(/more than 4096 entries/);
    expect(asked).toHaveLength(5);
  });

  it.each([
    ['another host', '<http://127.0.0.2:1/v2/image/referrers/x?page=1>; rel="next"'],
    ['another repository', `</v2/other/referrers/${SUBJECT}?page=1>; rel="next"`],
    ['a path that is a host', `<//evil.example/v2/image/referrers/${SUBJECT}?page=1>; rel="next"`],
    ['itself', `</v2/image/referrers/${SUBJECT}>; rel="next"`],
  ])('that goes on at %s is not used', async (_name, link) => {
    const { host, asked } = await start(() => ({ link }));
    await expect(list(host)).rejects.toThrow(/goes on at another place/);
    expect(asked).toHaveLength(1);
  });

  it('is given up when the time is over, also between pages', async () => {
    const { host } = await start((number) =>
      number < 2 ? { link: `<?page=${number + 1}>; rel="next"` } : { silent: true },
    );
    await expect(list(host, AbortSignal.timeout(300))).rejects.toThrow();
  });

  it('that has links to other things ends there', async () => {
    const { host } = await start(() => ({ link: '<?page=1>; rel="prev"' }));
    expect(await list(host)).toHaveLength(1);
  });
});
