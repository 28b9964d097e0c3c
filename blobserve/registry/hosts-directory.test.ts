import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { FaultServer } from '../../test/fault-server.js';
import { digestOf } from './digest.js';
import { HostsDirectory } from './hosts-directory.js';
import { parseReference } from './reference.js';
import { RegistryClient } from './registry-client.js';

let folder: string;
let problems: string[];
let now: number;
let hosts: HostsDirectory;

beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'hosts-directory-'));
  problems = [];
  now = 0;
  hosts = new HostsDirectory([path.join(folder, 'certs.d')], {
    onProblem: (problem) => problems.push(problem),
    now: () => now,
  });
  mkdirSync(path.join(folder, 'certs.d', 'registry.example'), { recursive: true });
});

afterEach(() => rmSync(folder, { recursive: true }));

const PEM = '-----BEGIN CERTIFICATE-----\n';

describe('a mirror that may give and not say what a tag means', () => {
  it('is asked for what has a digest alone', async () => {
    const mirror = await FaultServer.start();
    const origin = await FaultServer.start();
    const type = 'application/vnd.oci.image.manifest.v1+json';
    const config = {
      mediaType: 'application/vnd.oci.image.config.v1+json',
      digest: digestOf(Buffer.alloc(1)),
      size: 1,
    };
    const manifest = { schemaVersion: 2, mediaType: type, config, layers: [] };
    const digest = origin.addManifest('1', manifest, type);
    mirror.addManifest('1', manifest, type);
    const directory = path.join(folder, 'certs.d', origin.host.replace(/:(\d+)$/, '_$1_'));
    mkdirSync(directory);
    const text = `server = "${origin.url}"\n[host."${mirror.url}"]\ncapabilities = ["pull"]\n`;
    writeFileSync(path.join(directory, 'hosts.toml'), text);
    const client = new RegistryClient({ hosts });
    const tagged = parseReference(`${origin.host}/team/app:1`);
    await client.fetchManifest(tagged);
    expect([mirror.count('/manifests/'), origin.count('/manifests/')]).toEqual([0, 1]);
    await client.fetchManifest({ ...tagged, digest });
    expect([mirror.count('/manifests/'), origin.count('/manifests/')]).toEqual([1, 1]);
    await client.close();
    await mirror.close();
    await origin.close();
  });
});

describe('the directory of a registry', () => {
  it('is read again when a file comes, changes or goes that it names elsewhere', async () => {
    const ca = path.join(folder, 'ca.pem');
    writeFileSync(
      path.join(folder, 'certs.d', 'registry.example', 'hosts.toml'),
      `[host."https://mirror.example"]\nca = ${JSON.stringify(ca)}\n`,
    );
    const trusted = async () => {
      now += 2000;
      const endpoints = await hosts.endpoints('registry.example');
      return endpoints.map(({ url, connection }) => [url?.host, connection.tls?.ca]);
    };
    const itself = [undefined, undefined];
    expect(await trusted()).toEqual([itself]);
    expect(problems).toEqual([expect.stringMatching(/mirror.example is left out: .*ca.pem cannot be read/)]);
    expect(await trusted()).toEqual([itself]);
    expect(problems).toHaveLength(1);
    writeFileSync(ca, PEM);
    expect(await trusted()).toEqual([['mirror.example', [PEM]], itself]);
    writeFileSync(ca, `${PEM}renewed`);
    expect(await trusted()).toEqual([['mirror.example', [`${PEM}renewed`]], itself]);
    rmSync(ca);
    expect(await trusted()).toEqual([itself]);
  });
});
