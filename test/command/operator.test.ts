/**
 * A node as its operator sees it: `status`, `top`, `doctor` and the metrics of a real stack in which a container runs.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile, writeFile } from 'node:fs/promises';
import http from 'node:http';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import type { Finding } from '../../cli/doctor/finding.js';
import type { StatusReport } from '../../cli/status-report.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import type { Containerd } from '../stack/containerd.js';
import { Stack } from '../stack/stack.js';
import type { Registry } from '../stack/registry.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { backendOf, missingForSystemTests } from '../system/requirements.js';
import { testUnless } from '../system/test-unless.js';
import { COMMAND, erofsNbd, NOBODY, nobodyCannot } from './run-command.js';

const missing = await missingForSystemTests();

const test = testUnless(missing);

let stack: Stack;
let registry: Registry;
let snapshotter: Snapshotter;
let containerd: Containerd;
let reference: string;
let layers: number;
/** `--config FILE`, by which a command finds this stack. */
let node: string[];
let metricsSocket: string;

beforeAll(async () => {
  if (missing !== undefined) return;
  stack = await Stack.create();
  registry = await stack.startRegistry();
  const image = await buildTinyImage({ format: 'tar+gzip' });
  layers = image.layers.length;
  reference = await registry.push(image, 'tiny:latest');
  const { address, root } = stack.plugin();
  metricsSocket = path.join(stack.directory, 'metrics.sock');
  const configuration = [
    `root = ${JSON.stringify(root)}`,
    `address = ${JSON.stringify(address)}`,
    '[metrics]',
    `address = ${JSON.stringify(`unix:${metricsSocket}`)}`,
    '[containerd]',
    `address = ${JSON.stringify(path.join(stack.directory, 'containerd', 'containerd.sock'))}`,
    '',
  ].join('\n');
  const file = path.join(stack.directory, 'operator.toml');
  await writeFile(file, configuration);
  node = ['--config', file];
  snapshotter = await stack.startSnapshotter({ configuration });
  containerd = await stack.startContainerd({ snapshotters: [snapshotter.plugin] });
  const choice = ['--snapshotter', snapshotter.plugin.name];
  await containerd.ctr('image', 'pull', '--plain-http', ...choice, reference);
  const { stdout } = await containerd.ctr('run', '--rm', ...choice, reference, 'once');
  expect(`${String(stdout)}\n`).toBe(TINY_GREETING);
});

afterAll(async () => {
  expect(await stack?.remove()).toEqual(missing === undefined ? [] : undefined);
});

/** By name and labels, as the text format has them: `name{a="b"}`. */
async function metrics(): Promise<ReadonlyMap<string, number>> {
  const text = await new Promise<string>((resolve, reject) => {
    http
      .get({ socketPath: metricsSocket, path: '/metrics', agent: false }, (response) => {
        let body = '';
        response.setEncoding('utf8').on('data', (piece: string) => (body += piece));
        response.on('end', () => resolve(body));
      })
      .on('error', reject);
  });
  return new Map(
    text
      .split('\n')
      .filter((line) => line !== '' && !line.startsWith('#'))
      .map((line) => [line.slice(0, line.lastIndexOf(' ')), Number(line.slice(line.lastIndexOf(' ')))]),
  );
}

describe('the operator of a node', () => {
  test('sees with status which layers of which image are served, and how the registry is', async () => {
    const { exitCode, stdout, stderr } = await erofsNbd(['status', '--json', ...node]);
    expect([exitCode, stderr]).toEqual([0, '']);
    const report = JSON.parse(stdout) as StatusReport;
    expect(report.layers).toHaveLength(layers);
    expect(report.backend).toBe(await backendOf(snapshotter));
    for (const layer of report.layers) {
      expect(layer).toMatchObject({ image: reference, kind: 'tar.gz', readErrors: 0, readsInFlight: 0 });
      // Indexing has read every byte of it.
      expect(layer.cachedShare).toBe(1);
      expect(layer.fetchedBytes).toBe(layer.blobBytes);
      expect(layer.device).not.toBe('');
    }
    expect(report.layers.reduce((sum, { reads }) => sum + reads, 0)).toBeGreaterThan(0);
    expect(report.cache.bytes).toBeGreaterThan(0);
    expect(report.registries).toEqual([
      expect.objectContaining({ host: registry.address, healthy: true, failures: 0, restingMs: 0 }),
    ]);
    const shown = (await erofsNbd(['status', ...node])).stdout;
    expect(shown).toContain(`${layers} attached`);
    expect(shown).toContain(registry.address);
    for (const { device } of report.layers) expect(shown).toContain(device);
  });

  test('reads the same from the metrics', async () => {
    const backend = await backendOf(snapshotter);
    const now = await metrics();
    const value = (name: string): number => now.get(name) ?? NaN;
    expect(value('erofs_nbd_data_plane_up')).toBe(1);
    expect(value('erofs_nbd_layers')).toBe(layers);
    expect(value(`erofs_nbd_attached_devices{backend="${backend}"}`)).toBe(layers);
    expect(value('erofs_nbd_grpc_call_seconds_count{call="Prepare",code="ALREADY_EXISTS"}')).toBe(layers);
    expect(value('erofs_nbd_device_reads_total')).toBeGreaterThan(0);
    expect(value('erofs_nbd_device_read_errors_total')).toBe(0);
    expect(value('erofs_nbd_device_reads_in_flight')).toBe(0);
    expect(value('erofs_nbd_oldest_blocked_read_seconds')).toBe(0);
    expect(value('erofs_nbd_decompression_seconds_count')).toBeGreaterThan(0);
    expect(value('erofs_nbd_cache_bytes')).toBeGreaterThan(0);
    const host = `host="${registry.address}"`;
    expect(
      [200, 206].reduce(
        (sum, status) =>
          sum + (now.get(`erofs_nbd_registry_request_seconds_count{${host},status="${status}"}`) ?? 0),
        0,
      ),
    ).toBeGreaterThanOrEqual(layers);
    expect(value(`erofs_nbd_registry_resting_seconds{${host}}`)).toBe(0);
  });

  test('is told by doctor that all is well, the registry too', async () => {
    const file = path.join(stack.directory, 'containerd', 'config.toml');
    const { exitCode, stdout } = await erofsNbd([
      'doctor',
      '--json',
      ...node,
      ...['--containerd-config', file],
      reference,
      registry.address,
    ]);
    const { ok, findings } = JSON.parse(stdout) as { ok: boolean; findings: Finding[] };
    expect(findings.filter(({ state }) => state === 'wrong')).toEqual([]);
    expect([exitCode, ok]).toEqual([0, true]);
    const found = findings.map(({ area, what, state }) => `${area}: ${what}: ${state}`);
    for (const what of [
      'proxy plugin',
      'annotations of pulls',
      'root directory',
      'transfer service',
      'socket',
    ]) {
      expect(found).toContain(`containerd: ${what}: ok`);
    }
    expect(found).toContain(`registry: ${reference}: ok`);
    expect(found).toContain(`registry: ${registry.address}: ok`);
  });

  test('is told by doctor what is wrong with the configuration of containerd, and what to do', async () => {
    const right = await readFile(path.join(stack.directory, 'containerd', 'config.toml'), 'utf8');
    const file = path.join(stack.directory, 'wrong.toml');
    const wrong = right
      .replace('enable_remote_snapshot_annotations = "true"', '')
      .replaceAll('erofs-nbd.sock', 'other.sock');
    expect(wrong).not.toBe(right);
    await writeFile(file, wrong);
    const { exitCode, stdout } = await erofsNbd(['doctor', ...node, '--containerd-config', file]);
    expect(exitCode).toBe(1);
    expect(stdout).toMatch(/^WRONG +containerd: proxy plugin +.*other\.sock/m);
    expect(stdout).toContain(`-> the snapshotter listens on ${snapshotter.plugin.address}`);
  });

  test('is told by status that it is for root, when he is somebody else', async () => {
    if ((await nobodyCannot()) !== undefined) return;
    // The directory of a stack is private: what stands in the way is the same, permission.
    const { exitCode, stderr } = await erofsNbd(
      ['status', '--root', snapshotter.plugin.root, '--config', '/dev/null'],
      NOBODY,
    );
    expect(exitCode).toBe(1);
    expect(stderr).toMatch(/is for root alone, .*: try again as root\n$/);
  });

  test('watches with top until he interrupts it, and nothing is left behind', async () => {
    const child = spawn(process.execPath, [COMMAND, 'top', '--interval', '0.2', ...node], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let [out, err] = ['', ''];
    child.stderr.setEncoding('utf8').on('data', (piece: string) => (err += piece));
    child.stdout.setEncoding('utf8').on('data', (piece: string) => {
      out += piece;
      // The second look, which has rates.
      if (/^per second /m.test(out)) child.kill('SIGINT');
    });
    const [code] = (await once(child, 'close')) as [number];
    expect([code, err]).toEqual([130, '']);
    const twice = await erofsNbd(['top', '--json', '--count', '2', '--interval', '0.1', ...node]);
    const lines = twice.stdout.trimEnd().split('\n');
    expect(lines.map((line) => (JSON.parse(line) as StatusReport).layers.length)).toEqual([layers, layers]);
  });

  test('sees in the metrics that the data plane died and serves again', async () => {
    const pid = (await snapshotter.hello())?.pid ?? 0;
    process.kill(pid, 'SIGKILL');
    const restarted = 'erofs_nbd_recoveries_total{what="data plane restarted"}';
    await expect.poll(async () => (await metrics()).get(restarted)).toBe(1);
    const now = await metrics();
    expect(now.get('erofs_nbd_recoveries_total{what="layer served again"}')).toBe(layers);
    expect(now.get(`erofs_nbd_attached_devices{backend="${await backendOf(snapshotter)}"}`)).toBe(layers);
  });
});
