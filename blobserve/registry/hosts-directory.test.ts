import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { HostsDirectory } from './hosts-directory.js';

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
