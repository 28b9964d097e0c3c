/**
 * Whether containerd is configured to ask us, and to tell us which image a layer is of.
 */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { parse, TomlError } from 'smol-toml';
import type { Configuration } from '../../daemon/configuration.js';
import { socketState } from './socket-state.js';
import { looking, type Finding } from './finding.js';

type Table = Readonly<Record<string, unknown>>;

const isTable = (value: unknown): value is Table =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

function at(table: unknown, ...keys: readonly string[]): unknown {
  return keys.reduce<unknown>((value, key) => (isTable(value) ? value[key] : undefined), table);
}

/** As containerd merges imports: tables by key, all else is replaced. */
export function merged(into: Table, from: Table): Table {
  const result: Record<string, unknown> = { ...into };
  for (const [key, value] of Object.entries(from)) {
    const before = result[key];
    result[key] = isTable(before) && isTable(value) ? merged(before, value) : value;
  }
  return result;
}

/** @throws {Error} naming the file that cannot be read or parsed */
async function load(file: string): Promise<Table> {
  const read = async (name: string): Promise<Table> => {
    try {
      return parse(await readFile(name, 'utf8'));
    } catch (error) {
      if (!(error instanceof TomlError)) throw error;
      throw new Error(`${name}: line ${error.line}: ${error.message.split('\n', 1)[0] ?? ''}`, {
        cause: error,
      });
    }
  };
  let table = await read(file);
  const imports = table['imports'];
  for (const pattern of Array.isArray(imports) ? imports : []) {
    if (typeof pattern !== 'string') continue;
    const absolute = path.resolve(path.dirname(file), pattern);
    for (const name of await matching(absolute)) table = merged(table, await read(name));
  }
  return table;
}

/** Files whose names match; containerd's patterns are those of Go's filepath.Glob, and stand in the last part in practice. */
async function matching(pattern: string): Promise<string[]> {
  const [directory, name] = [path.dirname(pattern), path.basename(pattern)];
  if (!/[*?]/.test(name)) return [pattern];
  const source = name
    .replace(/[.+^${}()|[\]\\]/g, '\\$&')
    .replaceAll('*', '.*')
    .replaceAll('?', '.');
  const names = await readdir(directory).catch(() => []);
  return names
    .filter((candidate) => new RegExp(`^${source}$`).test(candidate))
    .sort()
    .map((candidate) => path.join(directory, candidate));
}

/** What to write, for advice. */
const block = (address: string, name = 'erofs-nbd'): string =>
  `[proxy_plugins.${name}] with type = "snapshot" and address = "${address}"`;

export async function lookAtContainerd(
  configuration: Configuration,
  file: string,
): Promise<readonly Finding[]> {
  return [await lookAtSocket(configuration.containerd.address), ...(await lookAtFile(configuration, file))];
}

async function lookAtSocket(address: string): Promise<Finding> {
  const { ok, wrong } = looking('containerd', 'socket');
  const state = await socketState(address);
  if (state === 'answers') return ok(address);
  return wrong(
    `${address}: ${state}`,
    state === 'permission denied'
      ? 'run this as root'
      : 'start containerd, or say in containerd.address of our configuration where its socket is (k3s: /run/k3s/containerd/containerd.sock)',
  );
}

async function lookAtFile(configuration: Configuration, file: string): Promise<readonly Finding[]> {
  const { wrong } = looking('containerd', 'configuration');
  try {
    return findings(await load(file), configuration, file);
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') {
      return [
        wrong(
          `${(error as NodeJS.ErrnoException).path ?? file} does not exist`,
          `name containerd's file with --containerd-config, or write one with ${block(configuration.address)}`,
        ),
      ];
    }
    return [
      wrong(
        code === 'EACCES' ? `${file} may not be read` : message,
        code === 'EACCES' ? 'run this as root' : '',
      ),
    ];
  }
}

/** @param table containerd's configuration, imports merged */
export function findings(table: Table, { address, root }: Configuration, file: string): readonly Finding[] {
  const plugin = looking('containerd', 'proxy plugin');
  const plugins = at(table, 'proxy_plugins');
  const all = Object.entries(isTable(plugins) ? plugins : {});
  const [name, entry] = all.find(([, candidate]) => at(candidate, 'address') === address) ?? [];
  if (name === undefined || !isTable(entry)) {
    const named = all.find(([candidate]) => candidate === 'erofs-nbd');
    return [
      named === undefined
        ? plugin.wrong(
            `${file} has no proxy plugin with our address, ${address}`,
            `add ${block(address)} to it, and restart containerd`,
          )
        : plugin.wrong(
            `[proxy_plugins.${named[0]}] of ${file} has the address ${JSON.stringify(at(named[1], 'address'))}`,
            `the snapshotter listens on ${address}: change one of the two, and restart`,
          ),
    ];
  }
  return [
    entry['type'] === 'snapshot' || entry['type'] === 'io.containerd.snapshotter.v1'
      ? plugin.ok(`[proxy_plugins.${name}] of ${file}`)
      : plugin.wrong(
          `[proxy_plugins.${name}] has the type ${JSON.stringify(entry['type'])}`,
          'make it type = "snapshot"',
        ),
    lookAtAnnotations(entry, name),
    lookAtRoot(entry, name, root),
    lookAtUnpacking(table, name),
    ...lookAtKubernetes(table, name),
  ];
}

function lookAtAnnotations(entry: Table, name: string): Finding {
  const { ok, warning } = looking('containerd', 'annotations of pulls');
  const value = at(entry, 'exports', 'enable_remote_snapshot_annotations');
  if (value === 'true') return ok('enable_remote_snapshot_annotations = "true"');
  return warning(
    value === undefined
      ? `[proxy_plugins.${name}.exports] has no enable_remote_snapshot_annotations`
      : `enable_remote_snapshot_annotations is ${JSON.stringify(value)}, not the string "true"`,
    `set enable_remote_snapshot_annotations = "true" in [proxy_plugins.${name}.exports]: else ctr and nerdctl on containerd 2.x do not say which image a layer is of, and it is looked up (containerd.discover)`,
  );
}

function lookAtRoot(entry: Table, name: string, root: string): Finding {
  const { ok, warning } = looking('containerd', 'root directory');
  const value = at(entry, 'exports', 'root');
  if (value === root) return ok(root);
  return warning(
    value === undefined
      ? `[proxy_plugins.${name}.exports] has no root`
      : `[proxy_plugins.${name}.exports] has root = ${JSON.stringify(value)}`,
    `set root = "${root}" there: Kubernetes watches the free space of that directory`,
  );
}

/** Of containerd 2.x: the transfer service unpacks only what this list names. Version 2 of the file may be either's. */
function lookAtUnpacking(table: Table, name: string): Finding {
  const { ok, warning, wrong } = looking('containerd', 'transfer service');
  const list = at(table, 'plugins', 'io.containerd.transfer.v1.local', 'unpack_config');
  const named = Array.isArray(list) ? list.map((entry) => at(entry, 'snapshotter')) : [];
  if (named.includes(name)) return ok(`unpack_config names ${name}`);
  const version = at(table, 'version');
  const advice =
    `add [[plugins.'io.containerd.transfer.v1.local'.unpack_config]] with platform = "linux/${architecture()}", ` +
    `snapshotter = "${name}" and differ = "walking"; the list replaces containerd's own, so name overlayfs in another`;
  if (typeof version === 'number' && version >= 3) {
    return wrong(`no unpack_config for ${name}: "ctr image pull" and nerdctl refuse the snapshotter`, advice);
  }
  return warning(`no unpack_config for ${name}; containerd 2.x needs it, 1.x does not`, advice);
}

function architecture(): string {
  return process.arch === 'x64' ? 'amd64' : process.arch;
}

/** Whether Kubernetes uses us, and then, with containerd 1.x, whether it says which image a layer is of. */
function lookAtKubernetes(table: Table, name: string): readonly Finding[] {
  const { ok, skipped, wrong } = looking('containerd', 'Kubernetes (CRI)');
  const [old, current] = [
    at(table, 'plugins', 'io.containerd.grpc.v1.cri', 'containerd'),
    at(table, 'plugins', 'io.containerd.cri.v1.images'),
  ];
  const usesOld = at(old, 'snapshotter') === name;
  const usesCurrent = at(current, 'snapshotter') === name;
  if (!usesOld && !usesCurrent) return [skipped(`it does not use ${name}`)];
  if (usesOld && at(old, 'disable_snapshot_annotations') !== false) {
    return [
      wrong(
        'disable_snapshot_annotations is not false',
        'set disable_snapshot_annotations = false in [plugins."io.containerd.grpc.v1.cri".containerd]: else containerd 1.x does not say which image a layer is of',
      ),
    ];
  }
  return [ok(`it uses ${name}`)];
}
