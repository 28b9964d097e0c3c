import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { parseConfiguration } from '../../daemon/configuration.js';
import { renderFindings } from '../doctor.js';
import { findings, lookAtContainerd, merged } from './containerd.js';
import { lookAtInodes, lookAtSpace, lookAtType } from './disk.js';
import type { Finding } from './finding.js';
import { atLeast, missingCapabilities } from './kernel.js';

const configuration = parseConfiguration('', 'config.toml');

/** A table of containerd's that is right, with what is wrong put over it. */
function table(changes: object = {}): Record<string, unknown> {
  const right = {
    version: 3,
    proxy_plugins: {
      lazy: {
        type: 'snapshot',
        address: '/run/erofs-nbd/snapshotter.sock',
        exports: { root: '/var/lib/erofs-nbd', enable_remote_snapshot_annotations: 'true' },
      },
    },
    plugins: {
      'io.containerd.transfer.v1.local': {
        unpack_config: [{ snapshotter: 'overlayfs' }, { snapshotter: 'lazy' }],
      },
    },
  };
  return merged(right, changes as Record<string, unknown>);
}

/** Of what is not well: what it is, how bad, and what to do. */
function troubles(found: readonly Finding[]): string[] {
  return found
    .filter(({ state }) => state === 'warning' || state === 'wrong')
    .map(({ what, state, found: text, advice }) => `${what}: ${state}: ${text} -> ${advice}`);
}

const plugin = (changes: object): object => ({ proxy_plugins: { lazy: changes } });
const cri1 = { 'io.containerd.grpc.v1.cri': { containerd: { snapshotter: 'lazy' } } };

describe("containerd's configuration", () => {
  it('is found right, whatever the plugin is called', () => {
    expect(troubles(findings(table(), configuration, 'c.toml'))).toEqual([]);
  });

  it.each([
    [
      'no proxy plugin',
      { proxy_plugins: { lazy: { address: '/else' } } },
      /^proxy plugin: wrong: .*our address/,
    ],
    [
      'a plugin of our name elsewhere',
      { proxy_plugins: { lazy: { address: '/a' }, 'erofs-nbd': { address: '/b' } } },
      /has the address "\/b" -> the snapshotter listens on \/run\/erofs-nbd/,
    ],
    [
      'another type',
      plugin({ type: 'content' }),
      /^proxy plugin: wrong: .*type "content" -> make it type = "snapshot"/,
    ],
    [
      'annotations off',
      plugin({ exports: { enable_remote_snapshot_annotations: 'false' } }),
      /^annotations of pulls: warning: .*"false"/,
    ],
    [
      'annotations as a boolean',
      plugin({ exports: { enable_remote_snapshot_annotations: true } }),
      /is true, not the string "true"/,
    ],
    [
      'another root',
      plugin({ exports: { root: '/else' } }),
      /^root directory: warning: .*"\/else" -> set root = "\/var\/lib\/erofs-nbd"/,
    ],
    [
      'no unpack_config',
      { plugins: { 'io.containerd.transfer.v1.local': { unpack_config: [] } } },
      /^transfer service: wrong: .* -> add \[\[plugins/,
    ],
    [
      'no unpack_config, perhaps containerd 1.x',
      { version: 2, plugins: { 'io.containerd.transfer.v1.local': { unpack_config: [] } } },
      /^transfer service: warning: .*1\.x does not/,
    ],
    [
      'Kubernetes without annotations',
      { plugins: cri1 },
      /^Kubernetes \(CRI\): wrong: .*set disable_snapshot_annotations = false/,
    ],
  ])('%s is found', (_, changes, expected) => {
    const found = troubles(findings(table(changes), configuration, 'c.toml'));
    expect(found).toEqual([expect.stringMatching(expected) as string]);
  });

  it('takes what it imports, with patterns, over what it says itself', async () => {
    const directory = await mkdtemp(path.join(tmpdir(), 'erofs-nbd-doctor-'));
    try {
      await mkdir(path.join(directory, 'conf.d'));
      const file = path.join(directory, 'config.toml');
      await writeFile(
        file,
        'version = 3\nimports = ["conf.d/*.toml"]\n[proxy_plugins.lazy]\n  type = "content"\n',
      );
      await writeFile(
        path.join(directory, 'conf.d', 'lazy.toml'),
        '[proxy_plugins.lazy]\n  type = "snapshot"\n  address = "/run/erofs-nbd/snapshotter.sock"\n',
      );
      await writeFile(path.join(directory, 'conf.d', 'ignored.bak'), '[[[');
      const found = await lookAtContainerd(configuration, file);
      expect(found.find(({ what }) => what === 'proxy plugin')).toMatchObject({ state: 'ok' });
      await writeFile(path.join(directory, 'conf.d', 'bad.toml'), 'a = \n');
      expect(troubles(await lookAtContainerd(configuration, file)).join('\n')).toMatch(
        /conf\.d\/bad\.toml: line 1/,
      );
      expect(troubles(await lookAtContainerd(configuration, '/no/such/file')).join('\n')).toContain(
        '/no/such/file does not exist -> name containerd',
      );
    } finally {
      await rm(directory, { recursive: true });
    }
  });
});

describe('rights', () => {
  it('are read from the kernel', () => {
    expect(missingCapabilities('CapEff:\t000001ffffffffff\n')).toEqual([]);
    const docker = missingCapabilities('CapEff:\t00000000a80425fb\n').map(({ name }) => name);
    expect(docker).toEqual(['CAP_SYS_ADMIN', 'CAP_SYS_PTRACE']);
    expect(missingCapabilities('CapEff:\t0000000000000000\n')).toHaveLength(4);
  });
});

describe('versions of the kernel', () => {
  it.each([
    ['6.4.0', true],
    ['6.12.1-cloud', true],
    ['7.0', true],
    ['6.1.0-30-amd64', false],
    ['5.15', false],
  ])('%s is at least 6.4: %s', (version, expected) => expect(atLeast(version, 6, 4)).toBe(expected));
});

describe('the disk', () => {
  it('is found full, nearly so, without inodes, or of a kind that cannot hold containers', () => {
    expect([100, 2 ** 30, 2 ** 40].map((free) => lookAtSpace('/d', free).state)).toEqual([
      'wrong',
      'warning',
      'ok',
    ]);
    expect(
      [lookAtInodes('/d', 0, 0), lookAtInodes('/d', 1000, 5), lookAtInodes('/d', 1000, 500)].map(
        ({ state }) => state,
      ),
    ).toEqual(['ok', 'wrong', 'ok']);
    expect(lookAtType('/d', 0xef53).state).toBe('ok');
    expect(lookAtType('/d', 0x794c7630)).toMatchObject({
      state: 'wrong',
      found: expect.stringContaining('overlayfs') as string,
    });
  });
});

describe('findings', () => {
  it('are shown with what to do below what is wrong, and how many there are', () => {
    const found: Finding[] = [
      { area: 'disk', what: 'free space', state: 'ok', found: '10 GiB', advice: '' },
      { area: 'kernel', what: 'erofs', state: 'wrong', found: 'no\nerofs', advice: 'install it' },
    ];
    expect(renderFindings(found)).toBe(
      'ok      disk: free space  10 GiB\nWRONG   kernel: erofs     no�erofs\n        -> install it\n1 wrong, 0 warnings\n',
    );
  });
});
