/**
 * The configuration of both daemons: config.toml, validated once at start.
 *
 * Every key has a default, so an absent file is a valid configuration. Unknown keys are refused: a misspelt setting that
 * is silently ignored costs its owner an evening.
 */
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { parse, TomlError } from 'smol-toml';
import { z } from 'zod';
import { parseListenAddress, SOCKET_PATH_MAX } from './listen-address.js';
import { LOG_LEVELS } from './log.js';
import { parseDuration, parseSize } from './quantity.js';
import { VERSION } from './version.js';

export const DEFAULT_CONFIGURATION_FILE = '/etc/erofs-nbd/config.toml';

/** A setting written as text with a unit, checked against a range in bytes or milliseconds. */
function quantity(convert: (text: string) => number, fallback: string, minimum: string, maximum: string) {
  return z
    .string()
    .default(fallback)
    .transform((text, context) => {
      try {
        const value = convert(text);
        if (value >= convert(minimum) && value <= convert(maximum)) return value;
        context.addIssue({ code: 'custom', message: `expected something between ${minimum} and ${maximum}` });
      } catch (error) {
        context.addIssue({ code: 'custom', message: error instanceof Error ? error.message : String(error) });
      }
      return z.NEVER;
    });
}

const size = (fallback: string, minimum: string, maximum: string) =>
  quantity(parseSize, fallback, minimum, maximum);
const duration = (fallback: string, minimum: string, maximum: string) =>
  quantity(parseDuration, fallback, minimum, maximum);
const powerOfTwo = (value: number) => Number.isInteger(Math.log2(value));

const absolutePath = z.string().refine((value) => path.isAbsolute(value), 'expected an absolute path');
const pathOrNone = z
  .string()
  .refine((value) => value === '' || path.isAbsolute(value), 'expected an absolute path, or "" for none');
const pathList = (fallback: string) =>
  z
    .string()
    .default(fallback)
    .transform((value) => value.split(':').filter((one) => one !== ''))
    .refine(
      (paths) => paths.every((one) => path.isAbsolute(one)),
      'expected absolute paths with ":" between',
    );
const socketPath = absolutePath.refine(
  (value) => Buffer.byteLength(value) <= SOCKET_PATH_MAX,
  `expected a path of at most ${SOCKET_PATH_MAX} bytes, the kernel's limit for a socket`,
);

/** Somewhere on this machine to listen; undefined when it is empty: nowhere. */
const listenAddress = z.string().transform((text, context) => {
  if (text === '') return undefined;
  try {
    return parseListenAddress(text);
  } catch (error) {
    context.addIssue({ code: 'custom', message: error instanceof Error ? error.message : String(error) });
    return z.NEVER;
  }
});

/** Hours of the local day, "22:00-06:00"; empty: all of it. */
const dayWindow = z
  .string()
  .regex(
    /^(?:(?:[01]\d|2[0-3]):[0-5]\d-(?:[01]\d|2[0-3]):[0-5]\d)?$/,
    'expected two times of the day, such as "22:00-06:00"',
  );

/** Of the file's format. A file that does not say is of version 1; one of another version is refused. */
const FORMAT_VERSION = 1;

const schema = z.strictObject({
  version: z.literal(FORMAT_VERSION).default(FORMAT_VERSION),
  root: absolutePath.default('/var/lib/erofs-nbd'),
  address: socketPath.default('/run/erofs-nbd/snapshotter.sock'),
  attach: z.enum(['auto', 'nbd', 'fuse']).default('auto'),
  on_error: z.enum(['fail', 'unpack']).default('fail'),
  log: z
    .strictObject({
      level: z.enum(LOG_LEVELS).default('info'),
      format: z.enum(['auto', 'json', 'text']).default('auto'),
    })
    .prefault({}),
  registry: z
    .strictObject({
      insecure: z.array(z.string()).default([]),
      hosts_dir: pathList('/etc/containerd/certs.d'),
      docker_config: pathOrNone.default('/root/.docker/config.json'),
      cri_image_service: z.boolean().default(false),
      cri_credentials_kept: duration('7d', '1m', '365d'),
      kubernetes_secrets: pathOrNone.default(''),
      credential_provider_config: pathOrNone.default(''),
      credential_provider_directory: pathOrNone.default(''),
      credential_timeout: duration('15s', '100ms', '5m'),
      connect_timeout: duration('5s', '10ms', '10m'),
      response_timeout: duration('15s', '10ms', '10m'),
      stall_timeout: duration('15s', '10ms', '10m'),
      max_connections_per_host: z.int().min(1).max(1024).default(16),
      hedge: z.boolean().default(false),
    })
    .prefault({}),
  fetch: z
    .strictObject({
      read_deadline: duration('120s', '10ms', '30d'),
      max_range: size('4MiB', '4KiB', '64MiB'),
      readahead: size('8MiB', '0B', '1GiB'),
      max_in_flight: size('32MiB', '1MiB', '4GiB'),
    })
    .prefault({}),
  index: z
    .strictObject({
      build: z.boolean().default(true),
      workers: z.int().min(1).max(64).default(2),
      span_size: size('512KiB', '64KiB', '64MiB'),
      max_uncompressed: size('64GiB', '1MiB', '8TiB'),
      max_entries: z.int().min(1000).max(4_000_000).default(1_000_000),
      trust: z.enum(['pinned', 'referrers', 'none']).default('referrers'),
      sources: z
        .array(z.enum(['erofs-nbd', 'soci', 'estargz']))
        .refine((kinds) => new Set(kinds).size === kinds.length, 'expected each kind once')
        .default(['erofs-nbd', 'soci', 'estargz']),
      lookup_timeout: duration('3s', '100ms', '5m'),
      max_published: size('64MiB', '64KiB', '1GiB'),
    })
    .prefault({}),
  cache: z
    .strictObject({
      inflated: size('64MiB', '1MiB', '64GiB'),
      span_size: size('256KiB', '4KiB', '16MiB').refine(powerOfTwo, 'expected a power of two'),
      max_bytes: size('0B', '0B', '8TiB').refine(
        (bytes) => bytes === 0 || bytes >= 64 * 2 ** 20,
        'expected "0B", for no limit, or at least 64MiB',
      ),
      min_free: size('1GiB', '0B', '8TiB'),
      keep_unused: duration('7d', '0s', '3650d'),
      materialise: z.boolean().default(true),
    })
    .prefault({}),
  background: z
    .strictObject({
      download: z.boolean().default(true),
      delay: duration('60s', '0s', '30d'),
      rate: size('0B', '0B', '1TiB'),
      window: dayWindow.default(''),
    })
    .prefault({}),
  prefetch: z
    .strictObject({
      record: z.boolean().default(true),
      record_time: duration('30s', '100ms', '1h'),
      use: z.boolean().default(true),
      max_bytes: size('256MiB', '0B', '64GiB'),
      max_spans: z.int().min(1).max(65536).default(4096),
      range: size('2MiB', '64KiB', '64MiB'),
      requests: z.int().min(1).max(16).default(12),
      entrypoint: z.boolean().default(true),
      entrypoint_max_bytes: size('64MiB', '0B', '64GiB'),
    })
    .prefault({}),
  integrity: z
    .strictObject({
      verify: z.enum(['complete', 'strict']).default('complete'),
    })
    .prefault({}),
  nbd: z
    .strictObject({
      dead_connection_timeout: duration('30d', '1s', '365d'),
      io_timeout: duration('250ms', '100ms', '10m'),
    })
    .prefault({}),
  fuse: z
    .strictObject({
      attach_timeout: duration('60s', '100ms', '1h'),
    })
    .prefault({}),
  mount: z
    .strictObject({
      timeout: duration('150s', '1s', '1h'),
      overlay_options: z.array(z.string()).default([]),
    })
    .prefault({}),
  containerd: z
    .strictObject({
      discover: z.boolean().default(true),
      address: socketPath.default('/run/containerd/containerd.sock'),
      registries: z.array(z.string().regex(/^[^\s/]+:\d{1,5}$/, 'expected host:port')).default([]),
      timeout: duration('5s', '100ms', '5m'),
    })
    .prefault({}),
  metrics: z
    .strictObject({
      address: listenAddress.prefault(''),
    })
    .prefault({}),
  tracing: z
    .strictObject({
      endpoint: z
        .string()
        .refine(
          (text) => text === '' || (/^https?:\/\//.test(text) && URL.canParse(text)),
          'expected a URL such as "http://127.0.0.1:4318", or "" for none',
        )
        .default(''),
      slow_read: duration('100ms', '0s', '1h'),
    })
    .prefault({}),
  recovery: z
    .strictObject({
      attach: z.enum(['eager', 'first-use']).default('eager'),
      restart_backoff_max: duration('10s', '100ms', '10m'),
      silence_timeout: duration('30s', '2s', '1d'),
      standby: z.boolean().default(true),
      control_group: pathOrNone.default(''),
    })
    .prefault({}),
});

/** Sizes in bytes, times in milliseconds. */
export type Configuration = z.output<typeof schema>;

/** What the command line says, which wins over the file. */
export interface Overrides {
  root?: string;
  address?: string;
  logLevel?: string;
}

/** A configuration that cannot be used: the message names the file, the line or key, the value and what was expected. */
export class ConfigurationError extends Error {
  override readonly name = 'ConfigurationError';
}

function describeValue(document: unknown, keys: readonly PropertyKey[]): string {
  let value: unknown = document;
  for (const key of keys) {
    value =
      typeof value === 'object' && value !== null ? (value as Record<PropertyKey, unknown>)[key] : undefined;
  }
  return value === undefined ? '' : ` = ${JSON.stringify(value)}`;
}

/** Said alone: what else a file of another version says may be right there. */
function checkVersion(document: Record<string, unknown>, origin: string): void {
  const { version } = document;
  if (typeof version !== 'number' || version === FORMAT_VERSION) return;
  throw new ConfigurationError(
    `${origin}: version = ${version}: erofs-nbd ${VERSION} reads files of version ${FORMAT_VERSION}. Install the erofs-nbd that this ` +
      'file was written for, or write it anew from config.toml of this package',
  );
}

function validate(document: unknown, origin: string): Configuration {
  const result = schema.safeParse(document);
  if (result.success) return result.data;
  const lines = result.error.issues.map((issue) => {
    if (issue.code === 'unrecognized_keys') {
      const place = [...issue.path, ...issue.keys.slice(0, 1)].join('.');
      return `${origin}: ${place}: no such setting; config.toml of the package lists them all`;
    }
    const place = issue.path.join('.');
    return `${origin}: ${place}${describeValue(document, issue.path)}: ${issue.message}`;
  });
  throw new ConfigurationError(lines.join('\n'));
}

/**
 * Parses and checks the text of a configuration file.
 *
 * @param origin the file's name, for messages
 * @throws {ConfigurationError}
 */
export function parseConfiguration(text: string, origin: string, overrides: Overrides = {}): Configuration {
  let document: Record<string, unknown>;
  try {
    document = parse(text);
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    const reason = error.message.split('\n', 1)[0] ?? '';
    throw new ConfigurationError(`${origin}: line ${error.line}, column ${error.column}: ${reason}`);
  }
  checkVersion(document, origin);
  const configuration = validate(document, origin);
  if (Object.values(overrides).every((value) => value === undefined)) return configuration;
  const merged: Record<string, unknown> = { ...document };
  if (overrides.root !== undefined) merged.root = path.resolve(overrides.root);
  if (overrides.address !== undefined) merged.address = path.resolve(overrides.address);
  if (overrides.logLevel !== undefined) {
    merged.log = { ...(document.log as object | undefined), level: overrides.logLevel };
  }
  return validate(merged, 'command line');
}

/**
 * Reads the configuration.
 *
 * @param file what `--config` names; undefined: the default file, which may be absent
 * @throws {ConfigurationError} also when a file that was asked for cannot be read
 */
export function loadConfiguration(file: string | undefined, overrides: Overrides = {}): Configuration {
  const name = file ?? DEFAULT_CONFIGURATION_FILE;
  let text = '';
  try {
    text = readFileSync(name, 'utf8');
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code ?? String(error);
    if (file !== undefined || code !== 'ENOENT') {
      throw new ConfigurationError(`${name}: cannot be read (${code})`);
    }
  }
  return parseConfiguration(text, name, overrides);
}
