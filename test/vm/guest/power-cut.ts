/**
 * What runs in the test machine when its power is cut (test/vm/power-cut.ts): daemons with layers attached over nbd,
 * readers that fill the cache, blobs that go again to make room, snapshots that come and go.
 *
 *     power-cut.js BLOBS PORT KEPT [check]
 *
 * BLOBS has the layers' blobs as an OCI layout has them; PORT is the registry's, the same at every boot; KEPT is the last
 * snapshot whose creation was answered before the cut. With `check` it ends by itself after what every boot does first:
 * verify what the cut has left, start, find every snapshot that was answered for, read layers through their devices.
 * Prints lines of JSON.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdir, readdir, readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { status } from '@grpc/grpc-js';
import { execa } from 'execa';
import type { CallError } from '../../../proto/unary-call.js';
import { layout } from '../../../daemon/layout.js';
import { originalsIn, verifyRoot } from '../../crash/verify.js';
import { patience } from '../../patience.js';
import { SnapshotsClient } from '../../stack/snapshots-client.js';
import { pluginOf, startSnapshotter, type Snapshotter } from '../../stack/snapshotter.js';
import { LayerRegistry, type WantedLayer } from '../../system/layer-registry.js';
import { DISK } from '../machine.js';

const [blobs = '', port = '', kept = '', mode = ''] = process.argv.slice(2);
const LAST_KEPT = Number(kept);
/** Less than the layers together: blobs are evicted all the while. */
const CONFIGURATION = `version = 1
[cache]
span_size = "64KiB"
max_bytes = "64MiB"
min_free = "0B"
[background]
download = false
`;
/** Readers of layers, each a shell that starts one dd after the other. */
const READERS = 3;

const say = (event: string, what: Record<string, unknown> = {}): void =>
  console.log(JSON.stringify({ event, ...what }));

class Failure extends Error {}

async function verify(): Promise<void> {
  const verdict = await verifyRoot(pluginOf(DISK).root, originalsIn([blobs]));
  const { spans, trusted, rows, failures } = verdict;
  say('verified', { spans, trusted, rows, failures });
  if (failures.length > 0) throw new Failure('the cache or the database is not what it should be');
}

async function loadRegistry(): Promise<WantedLayer[]> {
  const registry = await LayerRegistry.start(Number(port));
  const directory = path.join(blobs, 'sha256');
  const layers: WantedLayer[] = [];
  for (const name of (await readdir(directory)).sort())
    layers.push(registry.addLayer(await readFile(path.join(directory, name))));
  return layers;
}

/** Every snapshot whose creation was answered, and said, before the power was cut. */
async function expectKept(client: SnapshotsClient): Promise<number> {
  const found = (await client.list()).filter(({ name }) => name.startsWith('kept/'));
  const names = new Set(found.map(({ name }) => name));
  for (let number = 1; number <= LAST_KEPT; number += 1)
    if (!names.has(`kept/${number}`)) throw new Failure(`kept/${number} was answered for and is gone`);
  // One more may have been committed and not answered.
  return Math.max(LAST_KEPT, ...found.map(({ name }) => Number(name.slice(5))));
}

/** @returns the layers' devices, by digest, when all are served */
async function attachAll(
  client: SnapshotsClient,
  snapshotter: Snapshotter,
  layers: readonly WantedLayer[],
): Promise<Map<string, string>> {
  for (const { chainId, labels } of layers) {
    await client.prepare(`extract/${chainId}`, '', labels).then(
      () => Promise.reject(new Failure(`layer ${chainId} is not served lazily`)),
      (error: CallError) => {
        if (error.code !== status.ALREADY_EXISTS) throw error;
      },
    );
  }
  const deadline = Date.now() + patience(60_000);
  for (;;) {
    const devices = (await snapshotter.devices()) ?? [];
    const paths = new Map(devices.map((device) => [device.layerDigest ?? '', device.path ?? '']));
    if (layers.every(({ digest }) => paths.has(digest))) return paths;
    if (Date.now() > deadline) throw new Failure(`only ${paths.size} layers are attached`);
    await delay(200);
  }
}

async function compareDevice(digest: string, device: string): Promise<void> {
  const file = await originalsIn([blobs])(digest);
  const compared = await execa('cmp', [device, file ?? ''], { reject: false, timeout: patience(60_000) });
  if (compared.exitCode !== 0)
    throw new Failure(`${device}, ${digest}: ${compared.stdout}${compared.stderr}`);
}

/** 256 KiB at a time, anywhere in any layer, past the page cache. Not in this process, which is the registry. */
function startReader(devices: readonly string[], blocks: number): ChildProcess {
  const loop = `while :; do
    device=\${DEVICES[$((RANDOM % \${#DEVICES[@]}))]}
    dd if=$device of=/dev/null bs=64k count=4 skip=$((RANDOM % ${blocks})) iflag=direct status=none || exit 1
  done`;
  return spawn('bash', ['-c', `DEVICES=(${devices.join(' ')})\n${loop}`], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
}

/** Until the power is cut. */
async function work(client: SnapshotsClient, devices: ReadonlyMap<string, string>, from: number) {
  const { blocks } = JSON.parse(await readFile(path.join(blobs, 'geometry.json'), 'utf8')) as {
    blocks: number;
  };
  for (let reader = 0; reader < READERS; reader += 1)
    startReader([...devices.values()], blocks).once('exit', (code) => {
      say('failed', { why: `a reader of devices ended with ${code}` });
    });
  say('working');
  for (let number = from + 1; ; number += 1) {
    await client.prepare(`kept/${number}`);
    say('kept', { number });
    await client.prepare(`gone/${number}`);
    await client.remove(`gone/${number}`);
  }
}

async function main(): Promise<void> {
  // Dirty pages go to the disk after tenths of a second instead of half a minute, in whatever order the kernel likes: what a
  // cut leaves is a mixture of old and new.
  await execa('sysctl', ['-q', 'vm.dirty_expire_centisecs=20', 'vm.dirty_writeback_centisecs=10']);
  const { root } = pluginOf(DISK);
  const isFirst = !(await readdir(DISK)).includes(path.basename(root));
  if (!isFirst) await verify();
  await mkdir(root, { recursive: true });
  const layers = await loadRegistry();
  const start = performance.now();
  const snapshotter = await startSnapshotter({
    directory: DISK,
    configuration: CONFIGURATION,
    logLevel: 'info',
  });
  say('started', { ms: Math.round(performance.now() - start) });
  const client = new SnapshotsClient(snapshotter.plugin.address);
  const number = await expectKept(client);
  const devices = await attachAll(client, snapshotter, layers);
  const chosen = [...devices].sort(() => Math.random() - 0.5).slice(0, 2);
  for (const [digest, device] of chosen) await compareDevice(digest, device);
  say('right', { kept: number, attached: devices.size, compared: chosen.length });
  if (mode !== 'check') return work(client, devices, number);
  for (const { name } of (await client.list()).reverse()) await client.remove(name);
  await client.cleanup();
  await snapshotter.stop();
  await snapshotter.stopServing();
  const left = await readdir(layout(root).layers);
  if (left.length > 0) throw new Failure(`left in ${layout(root).layers}: ${left.join(', ')}`);
  await rm(root, { recursive: true });
  say('end');
}

main().then(
  () => process.exit(0),
  async (error: unknown) => {
    say('failed', { why: error instanceof Error ? (error.stack ?? error.message) : String(error) });
    const log = await readFile(path.join(DISK, 'erofs-nbd.log'), 'utf8').catch(() => '');
    for (const line of log.trimEnd().split('\n').slice(-30)) console.log(line.slice(0, 600));
    process.exit(1);
  },
);
