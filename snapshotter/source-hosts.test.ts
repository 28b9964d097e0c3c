import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { directoryHosts, hostsOf, sourcesOf } from './source-hosts.js';

const label = (host: string, value: string) => ({ [`containerd.io/distribution.source.${host}`]: value });
const nothing = { configured: [], images: [], directories: [] };

describe('the sources of a blob', () => {
  it('are the repositories that its labels name', () => {
    const labels = {
      ...label('docker.io', 'library/a,library/b'),
      ...label('127.0.0.1', 'team/app'),
      other: 'x',
    };
    expect(sourcesOf(labels)).toEqual([
      { hostname: 'docker.io', repository: 'library/a' },
      { hostname: 'docker.io', repository: 'library/b' },
      { hostname: '127.0.0.1', repository: 'team/app' },
    ]);
  });

  it('may be at an IPv6 address, which references put in brackets', () => {
    expect(sourcesOf(label('::1', 'app'))).toEqual([{ hostname: '[::1]', repository: 'app' }]);
  });

  it.each(['', 'UPPER', '../../etc', 'user:secret@host/x', 'a b', '/'])('are not %j', (value) => {
    expect(sourcesOf(label('registry.example', value))).toEqual([]);
  });

  it('are at most 16', () => {
    const many = Array.from({ length: 500 }, (_, index) => `r${index}`).join(',');
    expect(sourcesOf(label('registry.example', many))).toHaveLength(16);
  });
});

describe('the hosts of a source', () => {
  const source = { hostname: '10.0.0.1', repository: 'team/app' };

  it('are the host as it is when no port is known', () => {
    expect(hostsOf(source, nothing)).toEqual(['10.0.0.1']);
  });

  it('are first those of an image of the same repository, then configured ones, then directories, then others', () => {
    const known = {
      images: ['10.0.0.1:1/other:1', '10.0.0.1:2/team/app:1', 'not a reference', '10.0.0.2:9/team/app'],
      configured: ['10.0.0.1:3', '10.0.0.10:3'],
      directories: ['10.0.0.1:4', '10.0.0.1_5_', '_default'],
    };
    expect(hostsOf(source, known)).toEqual([
      '10.0.0.1:2',
      '10.0.0.1:3',
      '10.0.0.1:4',
      '10.0.0.1:5',
      '10.0.0.1:1',
      '10.0.0.1',
    ]);
  });

  it('are found in the directories of certs.d, of which some may not be there', async () => {
    const directory = await mkdtemp(path.join(tmpdir(), 'hosts-'));
    try {
      await mkdir(path.join(directory, 'registry.example:5000'));
      expect(await directoryHosts([path.join(directory, 'absent'), directory])).toEqual([
        'registry.example:5000',
      ]);
    } finally {
      await rm(directory, { recursive: true });
    }
  });
});
