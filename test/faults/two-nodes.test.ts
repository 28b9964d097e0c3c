/**
 * Two nodes: the second is a network namespace with a wire to the first and to nothing else. On the first runs a registry
 * that keeps what went through it (docker-registry's pull-through cache), as the agents of peer-to-peer distribution do;
 * the second's hosts.toml names it as mirror. The registry that the image is named after is gone.
 */
import { execFile, execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { expect, it } from 'vitest';
import { checkout } from '../debian/packages.js';
import { DockerRegistry, noDockerRegistry } from '../docker-registry.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import { pushImage } from '../stack/push-image.js';
import { missingForSystemTests } from '../system/requirements.js';

const NAMESPACE = `erofs-nbd-${process.pid}`;
/** Of the block that RFC 2544 keeps for measuring networks: few networks have it. */
const FIRST = '198.18.77.1';
const SECOND = '198.18.77.2';
const PROGRAM = path.join(checkout, 'dist', 'test', 'faults', 'second-node.js');

function ip(...parameters: string[]): void {
  execFileSync('ip', parameters, { stdio: 'pipe' });
}

/** Why there can be no second node here. */
async function missingForTwoNodes(): Promise<string | undefined> {
  const missing = noDockerRegistry ?? (await missingForSystemTests());
  if (missing !== undefined) return missing;
  if (!existsSync(PROGRAM)) return `${PROGRAM} is not built`;
  try {
    ip('netns', 'add', NAMESPACE);
    ip('netns', 'del', NAMESPACE);
    return undefined;
  } catch (error) {
    return `no network namespaces: ${error instanceof Error ? error.message : String(error)}`;
  }
}

it('a container starts from what another node has, with its registry cut off', async (context) => {
  const missing = await missingForTwoNodes();
  if (missing !== undefined) return context.skip(missing);
  const folder = mkdtempSync(path.join(tmpdir(), 'two-nodes-'));
  const origin = await DockerRegistry.start();
  const closing: (() => unknown)[] = [() => origin.stop(), () => rmSync(folder, { recursive: true })];
  try {
    const wire = `nbd${process.pid % 1_000_000}`;
    ip('netns', 'add', NAMESPACE);
    closing.unshift(() => ip('netns', 'del', NAMESPACE));
    ip('link', 'add', `${wire}a`, 'type', 'veth', 'peer', 'name', `${wire}b`, 'netns', NAMESPACE);
    ip('address', 'add', `${FIRST}/30`, 'dev', `${wire}a`);
    ip('link', 'set', `${wire}a`, 'up');
    ip('-n', NAMESPACE, 'address', 'add', `${SECOND}/30`, 'dev', `${wire}b`);
    ip('-n', NAMESPACE, 'link', 'set', `${wire}b`, 'up');
    ip('-n', NAMESPACE, 'link', 'set', 'lo', 'up');

    const image = await buildTinyImage({ format: 'erofs-lz4hc' });
    await pushImage(image, origin.host, 'team/tiny:1');
    const peer = await DockerRegistry.start({ pullThrough: `http://${origin.host}`, address: FIRST });
    closing.unshift(() => peer.stop());
    // The first node has the image.
    const manifest = await (await fetchOk(`http://${peer.host}/v2/team/tiny/manifests/1`)).json();
    const { config, layers } = manifest as { config: { digest: string }; layers: { digest: string }[] };
    for (const { digest } of [config, ...layers]) {
      await (await fetchOk(`http://${peer.host}/v2/team/tiny/blobs/${digest}`)).arrayBuffer();
      await expect.poll(() => peer.stores('team/tiny', digest)).toBe(true);
    }
    await origin.stop();

    const hosts = path.join(folder, origin.host.replace(/:(\d+)$/, '_$1_'));
    mkdirSync(hosts);
    writeFileSync(
      path.join(hosts, 'hosts.toml'),
      `server = "http://${origin.host}"\n[host."http://${peer.host}"]\ncapabilities = ["pull", "resolve"]\n`,
    );
    const reference = `${origin.host}/team/tiny:1`;
    const { stdout } = await promisify(execFile)(
      'nsenter',
      [`--net=/run/netns/${NAMESPACE}`, process.execPath, '--enable-source-maps', PROGRAM, reference, folder],
      { timeout: patience(150_000), killSignal: 'SIGTERM' },
    );
    expect(JSON.parse(stdout.trim().split('\n').at(-1) ?? '')).toEqual({
      reachable: false,
      devices: image.layers.length,
      output: TINY_GREETING.trimEnd(),
    });
  } finally {
    for (const close of closing) await close();
  }
});

async function fetchOk(url: string): Promise<Response> {
  const accept = 'application/vnd.oci.image.manifest.v1+json, */*';
  const response = await fetch(url, { headers: { accept } });
  if (!response.ok) throw new Error(`${url}: ${response.status} ${await response.text()}`);
  return response;
}
