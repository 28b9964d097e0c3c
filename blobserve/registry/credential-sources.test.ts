import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { patience } from '../../test/patience.js';
import { matchingKeys } from './credential-key.js';
import { parseConfiguration } from '../../daemon/configuration.js';
import { CredentialProviders } from './credential-provider.js';
import { credentialSources } from './credential-sources.js';
import { PasswordCredentials, type Credentials } from './credentials.js';
import { DockerConfig } from './docker-config.js';
import { KubernetesSecrets } from './kubernetes-secrets.js';
import { PullCredentials } from './pull-credentials.js';

let folder: string;
let problems: string[];
const before = process.env['PATH'];
const onProblem = (problem: string) => problems.push(problem);

beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'credentials-'));
  problems = [];
  process.env['PATH'] = `${folder}/bin:${before}`;
  mkdirSync(path.join(folder, 'bin'));
});

afterEach(() => {
  process.env['PATH'] = before;
  rmSync(folder, { recursive: true, force: true });
});

/** A program that counts its runs and keeps its input. */
function program(name: string, body: string): void {
  const file = path.join(folder, 'bin', name);
  writeFileSync(file, `#!/bin/sh\necho run >>${folder}/runs\ncat >${folder}/input\n${body}\n`);
  chmodSync(file, 0o755);
}
const runs = () => readFileSync(`${folder}/runs`, 'utf8').split('\n').length - 1;
const input = () => readFileSync(`${folder}/input`, 'utf8');
const shown = (found: readonly Credentials[]) =>
  found
    .map((one) => ('identityToken' in one ? one.identityToken : `${one.username}:${one.password}`))
    .join(' ');
const auth = (pair: string) => ({ auth: Buffer.from(pair).toString('base64') });

describe('matchingKeys', () => {
  it.each<[string, string, string, boolean]>([
    ['registry.example', 'registry.example', 'a/b', true],
    ['https://Registry.example/v2/', 'registry.example', 'a/b', true],
    ['registry.example:5000', 'registry.example', 'a/b', false],
    ['registry.example', 'registry.example:5000', 'a/b', false],
    ['registry.example/a', 'registry.example', 'a/b', true],
    ['registry.example/a', 'registry.example', 'ab', false],
    ['registry.example/a/b', 'registry.example', 'a/b', true],
    ['registry.example/a/b/c', 'registry.example', 'a/b', false],
    ['*.example', 'registry.example', 'a', true],
    ['*.example', 'a.registry.example', 'a', false],
    ['*.example:5000', 'registry.example:5000', 'a', true],
    ['*.dkr.ecr.*.amazonaws.com', '123.dkr.ecr.eu-west-1.amazonaws.com', 'a', true],
    ['reg?stry.[a-e]xample', 'registry.example', 'a', true],
    ['reg?stry.[f-z]xample', 'registry.example', 'a', false],
    ['https://index.docker.io/v1/', 'registry-1.docker.io', 'library/x', true],
    ['docker.io/library', 'registry-1.docker.io', 'library/x', true],
    ['[::1]:5000', '[::1]:5000', 'a', true],
    ['*', 'registry.example', 'a', false],
    ['r[.example', 'rx.example', 'a', false],
    ['.*', 'registry.example', 'a', false],
  ])('%s for %s/%s: %s', (key, host, repository, expected) => {
    expect(matchingKeys([key], host, repository).length === 1).toBe(expected);
  });

  it('gives the most specific first', () => {
    const keys = ['*.example', 'r.example', 'r.example/a', '*.example/a/b', 'other.example'];
    expect(matchingKeys(keys, 'r.example', 'a/b')).toEqual([
      '*.example/a/b',
      'r.example/a',
      'r.example',
      '*.example',
    ]);
  });
});

describe('Docker’s configuration', () => {
  const config = (document: unknown, helperTimeoutMs = 10_000) => {
    writeFileSync(path.join(folder, 'config.json'), JSON.stringify(document));
    return new DockerConfig(path.join(folder, 'config.json'), { onProblem, helperTimeoutMs });
  };

  it('asks the helper of a registry, the one for all, and then the file', async () => {
    program('docker-credential-one', `echo '{"ServerURL":"x","Username":"one","Secret":"s3cret"}'`);
    program('docker-credential-all', `echo '{"Username":"all","Secret":"s3cret"}'`);
    program('docker-credential-none', `echo 'credentials not found in native keychain'; exit 1`);
    const docker = config({
      auths: { 'none.example': auth('file:s3cret'), 'one.example': {} },
      credHelpers: { 'one.example': 'one', 'none.example': 'none' },
      credsStore: 'all',
    });
    expect(shown(await docker.lookup('one.example', 'a'))).toBe('one:s3cret');
    expect(input()).toBe('one.example');
    expect(shown(await docker.lookup('registry-1.docker.io', 'library/a'))).toBe('all:s3cret');
    expect(input()).toBe('https://index.docker.io/v1/');
    expect(shown(await docker.lookup('none.example', 'a'))).toBe('file:s3cret');
    expect(problems).toEqual([]);
  });

  it('runs a helper once for all who ask, and again when what it gave is refused', async () => {
    program('docker-credential-one', `echo '{"Username":"one","Secret":"s3cret"}'`);
    const docker = config({ credsStore: 'one' });
    await Promise.all(Array.from({ length: 20 }, () => docker.lookup('one.example', 'a')));
    expect(runs()).toBe(1);
    expect(docker.refused('one.example', 'a')).toBe(true);
    await docker.lookup('one.example', 'a');
    expect(runs()).toBe(2);
    expect(docker.refused('other.example', 'a')).toBe(false);
  });

  it.each<[string, string, string]>([
    ['fails', 'echo s3cret; exit 3', 'ended with status 3'],
    ['answers nonsense', 'echo s3cret', 'gave no user name and secret'],
    [
      'answers without end',
      'while :; do echo s3crets3crets3crets3crets3cret; done',
      'more than 262144 bytes',
    ],
    ['hangs, and its child too', 'sleep 1000 & sleep 1000', 'took longer than 500 ms'],
  ])('goes on without a helper that %s, and says so without the secret', async (_name, body, message) => {
    program('docker-credential-bad', body);
    const docker = config({ credsStore: 'bad', auths: { 'r.example': auth('file:pass') } }, 500);
    expect(shown(await docker.lookup('r.example', 'a'))).toBe('file:pass');
    expect(problems.join()).toContain(message);
    expect(problems.join()).not.toContain('s3cret');
    expect(problems.join()).toContain('try by hand: echo r.example | docker-credential-bad get');
  });

  it('takes no path for a helper’s name', async () => {
    program('evil', `echo '{"Username":"one","Secret":"s3cret"}'`);
    const docker = config({ credsStore: '/../evil' });
    expect(await docker.lookup('r.example', 'a')).toEqual([]);
    expect(problems.join()).toContain('is no program name');
  });
});

describe('Kubernetes pull secrets', () => {
  it('are found in files and mounted directories, and when they change', async () => {
    const directory = path.join(folder, 'secrets');
    const secrets = new KubernetesSecrets(directory, { onProblem });
    expect(await secrets.lookup('a.example', 'team/x')).toEqual([]);
    await secrets.lookup('a.example', 'team/x');
    expect(problems).toEqual([`${directory} cannot be read (ENOENT); there are no pull secrets`]);

    mkdirSync(path.join(directory, 'mounted'), { recursive: true });
    const write = (name: string, auths: unknown) =>
      writeFileSync(path.join(directory, name), JSON.stringify({ auths }));
    write('one.json', { 'a.example': auth('one:1'), '*.b.example': auth('glob:2') });
    write('mounted/.dockerconfigjson', { 'c.example/team': auth('mounted:3') });
    expect(shown(await secrets.lookup('a.example', 'team/x'))).toBe('one:1');
    expect(shown(await secrets.lookup('x.b.example', 'team/x'))).toBe('glob:2');
    expect(shown(await secrets.lookup('c.example', 'team/x'))).toBe('mounted:3');
    expect(await secrets.lookup('c.example', 'other/x')).toEqual([]);
    write('one.json', { 'a.example': auth('renewed:11') });
    expect(shown(await secrets.lookup('a.example', 'team/x'))).toBe('renewed:11');
    rmSync(path.join(directory, 'one.json'));
    expect(await secrets.lookup('a.example', 'team/x')).toEqual([]);
  });

  it('that are for the same registry are all given, by name, the most specific key of each first', async () => {
    const directory = path.join(folder, 'secrets');
    mkdirSync(directory);
    const write = (name: string, auths: unknown) =>
      writeFileSync(path.join(directory, name), JSON.stringify({ auths }));
    write('b', { 'a.example': auth('b:1'), 'other.example': auth('b:2') });
    write('a', { '*.example': auth('glob:3'), 'a.example/team': auth('team:4') });
    write('c', { 'a.example/elsewhere': auth('c:5') });
    const secrets = new KubernetesSecrets(directory, { onProblem });
    expect(shown(await secrets.lookup('a.example', 'team/x'))).toBe('team:4 glob:3 b:1');
    expect(problems).toEqual([]);
  });

  it('run no program', async () => {
    program('docker-credential-one', `echo '{"Username":"one","Secret":"s3cret"}'`);
    mkdirSync(path.join(folder, 'secrets'));
    writeFileSync(path.join(folder, 'secrets', 'x'), '{"credsStore":"one"}');
    expect(await new KubernetesSecrets(path.join(folder, 'secrets')).lookup('a.example', 'x')).toEqual([]);
    expect(() => runs()).toThrow('ENOENT');
  });
});

describe('the sources of the configuration', () => {
  it('are asked in their order, each when it is switched on', async () => {
    const write = (name: string, pair: string) => {
      mkdirSync(path.dirname(path.join(folder, name)), { recursive: true });
      writeFileSync(path.join(folder, name), JSON.stringify({ auths: { 'r.example': auth(pair) } }));
    };
    write('config.json', 'docker:1');
    write('secrets/one', 'secret:2');
    program(
      'plugin',
      `echo '{"kind":"CredentialProviderResponse","cacheKeyType":"Image","auth":{"r.example":{"username":"plugin","password":"3"}}}'`,
    );
    writeFileSync(
      path.join(folder, 'providers.yaml'),
      'kind: CredentialProviderConfig\nproviders:\n- {name: plugin, matchImages: [r.example], defaultCacheDuration: 1h, apiVersion: credentialprovider.kubelet.k8s.io/v1}\n',
    );
    const pulls = new PullCredentials();
    pulls.remember({ host: 'r.example', repository: 'a' }, new PasswordCredentials('pull', '4'), 60_000);
    const log = { warn: (problem: unknown) => void problems.push(String(problem)) };
    const all = {
      docker_config: path.join(folder, 'config.json'),
      kubernetes_secrets: path.join(folder, 'secrets'),
      credential_provider_config: path.join(folder, 'providers.yaml'),
      credential_provider_directory: path.join(folder, 'bin'),
    };
    const none = Object.fromEntries(Object.keys(all).map((name) => [name, '']));
    const found = async (settings: Record<string, string>, from?: PullCredentials) => {
      const { registry } = parseConfiguration('', 'test');
      const sources = credentialSources({ ...registry, ...settings }, log, from);
      const lists = await Promise.all(sources.map((source) => source.lookup('r.example', 'a')));
      return shown(lists.flat());
    };
    expect(await found(all, pulls)).toBe('docker:1 pull:4 secret:2 plugin:3');
    expect(await found(none)).toBe('');
    expect(await found({ ...none, kubernetes_secrets: all.kubernetes_secrets })).toBe('secret:2');
    expect(await found({ ...all, docker_config: '' })).toBe('secret:2 plugin:3');
    expect(problems).toEqual([]);
  });
});

describe('credential providers of the kubelet', () => {
  const API = 'credentialprovider.kubelet.k8s.io/v1';
  const response = (changes: Record<string, unknown> = {}) =>
    `echo '${JSON.stringify({
      kind: 'CredentialProviderResponse',
      apiVersion: API,
      cacheKeyType: 'Registry',
      cacheDuration: '1h',
      auth: { '*.example': { username: 'plugin', password: 's3cret' } },
      ...changes,
    })}'`;
  const configure = (
    provider: Record<string, unknown> = {},
    document?: string,
    timeoutMs = patience(20_000),
  ) => {
    const config = path.join(folder, 'providers.json');
    const providers = [
      {
        name: 'plugin',
        matchImages: ['*.example/team'],
        defaultCacheDuration: '12h',
        apiVersion: API,
        args: ['get-credentials'],
        env: [{ name: 'PLUGIN_SAYS', value: 'hello' }],
        ...provider,
      },
    ];
    writeFileSync(config, document ?? JSON.stringify({ kind: 'CredentialProviderConfig', providers }));
    return new CredentialProviders({
      config,
      directory: path.join(folder, 'bin'),
      timeoutMs,
      onProblem,
    });
  };

  it('are asked as the kubelet asks them, and their answers kept as they say', async () => {
    program('plugin', `echo "$1 $PLUGIN_SAYS" >${folder}/asked\n${response()}`);
    const providers = configure();
    expect(shown(await providers.lookup('r.example', 'team/app'))).toBe('plugin:s3cret');
    expect(JSON.parse(input())).toEqual({
      kind: 'CredentialProviderRequest',
      apiVersion: API,
      image: 'r.example/team/app',
    });
    expect(readFileSync(`${folder}/asked`, 'utf8')).toBe('get-credentials hello\n');
    // Kept for the registry.
    await providers.lookup('r.example', 'team/other');
    expect(runs()).toBe(1);
    await providers.lookup('s.example', 'team/other');
    expect(runs()).toBe(2);
    expect(await providers.lookup('r.example', 'elsewhere')).toEqual([]);
    expect(runs()).toBe(2);
    expect(providers.refused('r.example', 'team/app')).toBe(true);
    await providers.lookup('r.example', 'team/app');
    expect(runs()).toBe(3);
    expect(problems).toEqual([]);
  });

  it('are asked each time when they say so, and again when an answer is over', async () => {
    program('plugin', response({ cacheDuration: '0s' }));
    await configure().lookup('r.example', 'team/app');
    program('plugin', response({ cacheDuration: '3s', cacheKeyType: 'Image' }));
    const providers = configure();
    await providers.lookup('r.example', 'team/app');
    await providers.lookup('r.example', 'team/app');
    expect(runs()).toBe(2);
    await new Promise((resolve) => setTimeout(resolve, 3100));
    await providers.lookup('r.example', 'team/app');
    expect(runs()).toBe(3);
  });

  it.each<[string, string, string]>([
    ['fails', 'echo s3cret; exit 1', 'ended with status 1'],
    ['hangs', 'sleep 1000', 'took longer than 500 ms'],
    ['answers nonsense', 'echo s3cret', 'gave no CredentialProviderResponse'],
    [
      'answers something else',
      response({ cacheKeyType: 's3cret' }),
      'CredentialProviderResponse of v1 (cacheKeyType)',
    ],
  ])('that %s is told of, and left alone for a while', async (name, body, message) => {
    program('plugin', body);
    const providers = configure({}, undefined, name === 'hangs' ? 500 : undefined);
    expect(await providers.lookup('r.example', 'team/app')).toEqual([]);
    expect(await providers.lookup('r.example', 'team/app')).toEqual([]);
    expect(runs()).toBe(1);
    expect(problems).toHaveLength(1);
    expect(problems[0]).toContain(message);
    expect(problems[0]).toContain('it was asked for r.example/team/app');
    expect(problems[0]).not.toContain('s3cret');
  });

  it.each<[Record<string, unknown>, string | undefined, string]>([
    [{ name: '../evil' }, undefined, 'providers.0.name is not as'],
    [{ apiVersion: 'v9' }, undefined, 'providers.0.apiVersion is not as'],
    [{ tokenAttributes: { serviceAccountTokenAudience: 'x' } }, undefined, 'tokens of service accounts'],
    [{}, 'kind: CredentialProviderConfig', 'providers is not as'],
    [{}, 'kind: "s3cret', 'line 1, column 14: this is not YAML'],
    [{}, 'a: &a [s3cret]\nb: *c', 'this is not YAML'],
  ])('are not asked when configured wrongly: %j %s', async (provider, document, message) => {
    program('plugin', response());
    expect(await configure(provider, document).lookup('r.example', 'team/app')).toEqual([]);
    expect(problems.join()).toContain(message);
    expect(problems.join()).not.toContain('s3cret');
  });

  it('are configured in YAML too, as in the kubelet’s manual', async () => {
    program('plugin', `echo "$1 $PLUGIN_SAYS" >${folder}/asked\n${response()}`);
    const providers = configure(
      {},
      `# Kubernetes, "Configure a kubelet image credential provider"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: plugin
    matchImages:
      - "*.dkr.ecr.*.amazonaws.com"
      - '*.example/team'
    defaultCacheDuration: "12h"
    apiVersion: ${API}
    args:
      - get-credentials
    env:
      - name: PLUGIN_SAYS
        value: "hello"
`,
    );
    expect(shown(await providers.lookup('r.example', 'team/app'))).toBe('plugin:s3cret');
    expect(readFileSync(`${folder}/asked`, 'utf8')).toBe('get-credentials hello\n');
    expect(problems).toEqual([]);
  });
});
