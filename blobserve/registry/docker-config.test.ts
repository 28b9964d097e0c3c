import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { inspect } from 'node:util';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { DockerConfig, dockerConfigPath } from './docker-config.js';

let folder: string;
let path: string;
let problems: string[];
let config: DockerConfig;

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'docker-config-'));
  path = join(folder, 'config.json');
  problems = [];
  config = new DockerConfig(path, { helperTimeoutMs: 0, onProblem: (problem) => problems.push(problem) });
});

afterEach(async () => {
  await rm(folder, { recursive: true });
});

const base64 = (text: string) => Buffer.from(text).toString('base64');

async function lookup(host: string): Promise<unknown> {
  const [found] = await config.lookup(host);
  if (found === undefined) return undefined;
  return 'identityToken' in found ? found.identityToken : [found.username, found.password];
}

describe('DockerConfig', () => {
  it('is anonymous without a file, and notices when one appears and changes', async () => {
    expect(await lookup('host:5000')).toBeUndefined();
    await writeFile(path, JSON.stringify({ auths: { 'host:5000': { auth: base64('me:one') } } }));
    expect(await lookup('host:5000')).toEqual(['me', 'one']);
    await writeFile(path, JSON.stringify({ auths: { 'host:5000': { auth: base64('me:another') } } }));
    expect(await lookup('host:5000')).toEqual(['me', 'another']);
    await rm(path);
    expect(await lookup('host:5000')).toBeUndefined();
    expect(problems).toEqual([]);
  });

  it('finds all the forms that log-in commands write', async () => {
    const auths = {
      'https://index.docker.io/v1/': { auth: base64('hub:p:w:ü') },
      'https://Url.example/v2/': { username: 'u', password: 'p' },
      'url.example:5000': { auth: base64('port:x\0\0') },
      'token.example': { auth: base64('me:ignored'), identitytoken: 'refresh' },
      'empty.example': {},
      'path.example/team': { auth: base64('team:x') },
    };
    await writeFile(path, JSON.stringify({ auths, credsStore: 'x', HttpHeaders: {} }));
    for (const hub of ['docker.io', 'index.docker.io', 'registry-1.docker.io']) {
      expect(await lookup(hub)).toEqual(['hub', 'p:w:ü']);
    }
    expect(await lookup('url.example')).toEqual(['u', 'p']);
    expect(await lookup('url.example:5000')).toEqual(['port', 'x']);
    expect(await lookup('token.example')).toBe('refresh');
    for (const none of ['empty.example', 'path.example', 'example', '__proto__', 'constructor', '']) {
      expect(await lookup(none)).toBeUndefined();
    }
    expect(problems).toEqual([]);
  });

  it.each([
    ['{"auths": {"h": {"auth": "s3cret', 'is not JSON'],
    ['{"auths": {"h": {"auth": 12345}}}', 'auths → h → auth'],
    ['{"auths": ["s3cret"]}', 'auths'],
    ['"s3cret"', 'expected object'],
  ])('says once that %s cannot be used, without quoting it', async (content, what) => {
    await writeFile(path, content);
    expect(await lookup('h')).toBeUndefined();
    expect(await lookup('h')).toBeUndefined();
    expect(problems.length).toBe(1);
    expect(problems[0]).toContain(path);
    expect(problems[0]).toContain(what);
    expect(problems[0]).not.toMatch(/s3cret|12345/);
  });

  it('says so when an entry is not base64 of user:password, or the path is no file', async () => {
    await writeFile(path, JSON.stringify({ auths: { h: { auth: base64('s3cret') } } }));
    expect(await lookup('h')).toBeUndefined();
    expect(problems[0]).toContain('the auth of h is not base64 of user:password');
    config = new DockerConfig(folder, { helperTimeoutMs: 0, onProblem: (problem) => problems.push(problem) });
    expect(await lookup('h')).toBeUndefined();
    expect(problems[1]).toContain('EISDIR');
  });

  it('shows no secret, however it is printed', async () => {
    const auths = { h: { auth: base64('me:s3cret') }, t: { identitytoken: 's3cret' } };
    await writeFile(path, JSON.stringify({ auths }));
    for (const shown of [config, await config.lookup('h'), await config.lookup('t')]) {
      for (const text of [inspect(shown, { depth: 9, showHidden: true }), JSON.stringify(shown)]) {
        expect(text).not.toMatch(new RegExp(`s3cret|${base64('me:s3cret')}`));
      }
    }
  });

  it('looks where Docker does', () => {
    expect(dockerConfigPath({ DOCKER_CONFIG: '/x' })).toBe('/x/config.json');
    expect(dockerConfigPath({})).toMatch(/\/\.docker\/config\.json$/);
  });
});
