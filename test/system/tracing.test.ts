/**
 * What a receiver of OpenTelemetry's protocol is told of a pull and of the reads after it: OTLP over HTTP, in JSON.
 */
import { once } from 'node:events';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import * as grpc from '@grpc/grpc-js';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { layout } from '../../daemon/layout.js';
import { snapshotsService } from '../../proto/service.js';
import { unaryCall } from '../../proto/unary-call.js';
import { FaultServer, redirect } from '../fault-server.js';
import { smallErofs } from '../image/small-erofs.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry, type WantedLayer } from './layer-registry.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

/** opentelemetry-proto, trace/v1/trace.proto, as JSON. */
interface OtlpValue {
  readonly stringValue?: string;
  readonly intValue?: number | string;
  readonly arrayValue?: { readonly values: readonly OtlpValue[] };
}
interface OtlpAttribute {
  readonly key: string;
  readonly value: OtlpValue;
}
interface OtlpSpan {
  readonly traceId: string;
  readonly spanId: string;
  readonly parentSpanId?: string;
  readonly name: string;
  readonly attributes: readonly OtlpAttribute[];
  readonly status: { readonly code?: number };
}
interface OtlpExport {
  readonly resourceSpans: readonly {
    readonly resource: { readonly attributes: readonly OtlpAttribute[] };
    readonly scopeSpans: readonly { readonly spans: readonly OtlpSpan[] }[];
  }[];
}

interface Span extends Omit<OtlpSpan, 'attributes'> {
  readonly service: unknown;
  readonly attributes: Readonly<Record<string, unknown>>;
}

const SIGNATURE = 'X-Amz-Signature=hush';
const TRACE = '4bf92f3577b34da6a3ce929d0e0e4736';
const CALLER = '00f067aa0ba902b7';

const valueOf = ({ stringValue, intValue, arrayValue }: OtlpValue): unknown =>
  stringValue ?? (intValue === undefined ? arrayValue?.values.map(valueOf) : Number(intValue));
const valuesOf = (attributes: readonly OtlpAttribute[]): Record<string, unknown> =>
  Object.fromEntries(attributes.map(({ key, value }) => [key, valueOf(value)]));

let received = '';
const spans: Span[] = [];
const receiver = http.createServer((request, response) => {
  let body = '';
  request.setEncoding('utf8').on('data', (piece: string) => (body += piece));
  request.on('end', () => {
    if (request.method !== 'POST' || request.url !== '/v1/traces') return void response.writeHead(404).end();
    received += body;
    for (const { resource, scopeSpans } of (JSON.parse(body) as OtlpExport).resourceSpans) {
      const { 'service.name': service } = valuesOf(resource.attributes);
      for (const span of scopeSpans.flatMap((scope) => scope.spans)) {
        spans.push({ ...span, service, attributes: valuesOf(span.attributes) });
      }
    }
    response.writeHead(200, { 'content-type': 'application/json' }).end('{}');
  });
});

describe('the spans of a pull', () => {
  let stack: Stack;
  let snapshotter: Snapshotter;
  let registry: LayerRegistry;
  let storage: FaultServer;
  let layer: WantedLayer;
  const client = () =>
    new grpc.Client(`unix:${snapshotter.plugin.address}`, grpc.credentials.createInsecure());

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    receiver.listen(0, '127.0.0.1');
    await once(receiver, 'listening');
    registry = await LayerRegistry.start();
    storage = await FaultServer.start();
    const { image } = await smallErofs(stack.directory, 2 ** 20);
    layer = registry.addLayer(image);
    storage.addBlob(image);
    registry.server.failAlways(
      '/blobs/',
      redirect(`http://${storage.host}/v2/team/app/blobs/${layer.digest}?${SIGNATURE}`),
    );
    const endpoint = `http://127.0.0.1:${(receiver.address() as AddressInfo).port}`;
    snapshotter = await stack.startSnapshotter({
      configuration: `[tracing]\nendpoint = "${endpoint}"\nslow_read = "0s"\n[cache]\nspan_size = "4KiB"\n[fetch]\nreadahead = "0B"`,
      environment: { OTEL_BSP_SCHEDULE_DELAY: '100' },
    });
  });
  afterAll(async () => {
    receiver.close();
    await registry?.server.close();
    await storage?.close();
    await stack?.remove();
  });

  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });

  const named = (name: string, trace?: string): Span[] =>
    spans.filter((span) => span.name === name && (trace === undefined || span.traceId === trace));

  test('are one trace with what containerd was doing, through both daemons to the registry', async () => {
    const [caller, metadata] = [client(), new grpc.Metadata()];
    metadata.set('traceparent', `00-${TRACE}-${CALLER}-01`);
    const request = { key: 'test/traced/extract', parent: '', labels: layer.labels };
    await expect(
      unaryCall(caller, snapshotsService.prepare, request, undefined, metadata),
    ).rejects.toMatchObject({ code: grpc.status.ALREADY_EXISTS });
    caller.close();
    await expect.poll(() => named('Snapshots/Prepare', TRACE)).toHaveLength(1);
    await expect.poll(() => named('BlobServe/Attach', TRACE)).toHaveLength(1);
    const about = {
      'erofs_nbd.layer': layer.digest,
      'erofs_nbd.image': `${registry.server.host}/team/app:latest`,
    };
    const [prepare] = named('Snapshots/Prepare');
    expect(prepare).toMatchObject({
      parentSpanId: CALLER,
      service: 'erofs-nbd-snapshotter',
      attributes: { ...about, 'erofs_nbd.snapshot': '"test/traced/extract"', 'rpc.grpc.status_code': 6 },
      // A lazy layer is an answer, and no trouble.
      status: { code: 0 },
    });
    const [whole] = named('attach and mount', TRACE);
    expect(whole).toMatchObject({ parentSpanId: prepare?.spanId, attributes: about });
    expect(named('mount', TRACE)).toMatchObject([{ parentSpanId: whole?.spanId }]);
    const [attach] = named('BlobServe/Attach', TRACE);
    expect(attach).toMatchObject({
      parentSpanId: whole?.spanId,
      service: 'erofs-nbd-blobserve',
      attributes: about,
    });
    expect(named('BlobServe/Describe', TRACE)).toMatchObject([{ parentSpanId: prepare?.spanId }]);
  });

  test('tell of requests where, what and how it ended, and nothing that is signed', async () => {
    const requests = spans.filter(({ name }) => name.startsWith('GET '));
    const [manifest] = requests.filter(
      ({ attributes, traceId }) =>
        traceId === TRACE && String(attributes['url.path']).includes('/manifests/'),
    );
    expect(manifest?.attributes).toMatchObject({
      'server.address': registry.server.host,
      'http.request.method': 'GET',
      'http.response.status_code': 200,
    });
    // What is mounted first was asked for behind the call that described the layer, before it was attached: work of no call.
    const [asked] = requests.filter(({ attributes }) => String(attributes['url.path']).includes('/blobs/'));
    expect(asked?.attributes['http.response.status_code']).toBe(307);
    const [sent] = requests.filter(({ name }) => name === `GET ${storage.host}`);
    expect(sent?.attributes).toMatchObject({
      'http.response.status_code': 206,
      'http.request.header.range': ['bytes=0-4095'],
    });
    expect(sent?.attributes).not.toHaveProperty('url.path');
    expect(received).not.toContain('hush');
  });

  test('have those of slow reads beside them, and not what is fetched for these', async () => {
    const [device] = (await snapshotter.devices()) ?? [];
    const directory = path.join(layout(snapshotter.plugin.root).layers, String(device?.layerId), 'fs');
    const before = named(`GET ${storage.host}`, TRACE).length;
    await execa('cat', [path.join(directory, 'data')], { stdout: 'ignore', timeout: 60_000 });
    await expect.poll(() => named('device read').length).toBeGreaterThan(0);
    for (const read of named('device read')) {
      expect(read.traceId).not.toBe(TRACE);
      expect(read.attributes).toMatchObject({ 'erofs_nbd.layer': layer.digest });
      expect(read.attributes['erofs_nbd.read.length']).toBeGreaterThan(0);
    }
    const asked = (): number => storage.count('/blobs/');
    await expect.poll(() => named(`GET ${storage.host}`).length).toBe(asked());
    expect(asked()).toBeGreaterThan(before);
    expect(named(`GET ${storage.host}`, TRACE)).toHaveLength(before);
  });
});
