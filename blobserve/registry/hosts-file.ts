/**
 * containerd's hosts.toml: where the images of one registry may be had from, and how (containerd, docs/hosts.md and
 * core/remotes/docker/config/hosts.go). A pure reader of text; files it names are read by hosts-directory.ts.
 *
 *     server = "https://registry.example"          # the registry itself, asked last; absent: the name in references
 *     [host."https://mirror.example"]              # asked before it, in the order of the file
 *       capabilities = ["pull", "resolve"]
 *       ca = "mirror.crt"
 *
 * As in containerd, settings of the server stand at the top level, and paths are relative to the file's directory.
 */
import path from 'node:path';
import { parse, TomlError } from 'smol-toml';
import { z } from 'zod';
import { parseGoDuration } from './go-duration.js';

export type Capability = 'pull' | 'resolve' | 'push' | 'referrers';

/** One place to ask, as the file has it. */
export interface HostDescription {
  /** Undefined: the registry that references name. */
  readonly url: URL | undefined;
  readonly capabilities: ReadonlySet<Capability>;
  /** Files of certificates to trust beside those of the system. */
  readonly ca: readonly string[];
  /** Files of client certificates and their keys; without a key file the key is in the first. */
  readonly client: readonly { readonly certificate: string; readonly key: string | undefined }[];
  readonly skipVerify: boolean | undefined;
  /** Names in lower case. May hold secrets. */
  readonly headers: Readonly<Record<string, string>>;
  /** Limit on making a connection, in milliseconds. */
  readonly connectTimeoutMs: number | undefined;
}

/** A hosts.toml that cannot be used: what is wrong and where, without the value, which may be a secret. */
export class HostsFileError extends Error {
  override readonly name = 'HostsFileError';
}

/** Most places for one registry: each may cost a time-out. */
const MAX_HOSTS = 32;
const ALL: readonly Capability[] = ['pull', 'resolve', 'push', 'referrers'];

const capability = z
  .string()
  .transform((text) => text.toLowerCase())
  .pipe(z.enum(['pull', 'resolve', 'push', 'referrers']));
const files = z.union([z.string().transform((file) => [file]), z.array(z.string()).max(100)]);
const pair = z.union([z.string(), z.tuple([z.string(), z.string()])]);
const clients = z.union([z.string().transform((file) => [file]), z.array(pair).max(100)]);
const headerValue = z.union([z.string(), z.array(z.string()).transform((values) => values.join(', '))]);
const dialTimeout = z.string().transform((text, context) => {
  try {
    return parseGoDuration(text);
  } catch {
    context.addIssue({ code: 'custom', message: 'expected a duration such as "5s"' });
    return z.NEVER;
  }
});

// Keys that we do not know are left alone, as containerd does: later versions add some.
const settings = {
  capabilities: z.array(capability).optional(),
  ca: files.optional(),
  client: clients.optional(),
  skip_verify: z.boolean().optional(),
  header: z
    .record(z.string().regex(/^[!#$%&'*+.^_`|~0-9A-Za-z-]+$/), headerValue)
    .refine((headers) => Object.values(headers).every((value) => /^[\t\x20-\x7e\x80-\xff]*$/.test(value)), {
      message: 'expected values without control characters',
    })
    .optional(),
  override_path: z.boolean().optional(),
  dial_timeout: dialTimeout.optional(),
};
const hostSchema = z.object(settings);
const fileSchema = z.object({
  ...settings,
  server: z.string().optional(),
  host: z.record(z.string(), hostSchema).optional(),
});

/**
 * The places to ask, in order; the registry itself is the last.
 *
 * @param directory what paths in the file are relative to
 * @throws {HostsFileError}
 */
export function parseHostsFile(text: string, directory: string): readonly HostDescription[] {
  let document: Record<string, unknown>;
  try {
    document = parse(text);
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    throw new HostsFileError(`line ${error.line}, column ${error.column}: this is not TOML`);
  }
  const result = fileSchema.safeParse(document);
  if (!result.success) {
    const issue = result.error.issues[0];
    throw new HostsFileError(`${issue?.path.map(String).join('.') ?? ''}: ${issue?.message ?? 'not usable'}`);
  }
  const hosts = Object.entries(result.data.host ?? {});
  if (hosts.length > MAX_HOSTS) {
    throw new HostsFileError(`${hosts.length} hosts; at most ${MAX_HOSTS} are taken`);
  }
  return [
    ...hosts.map(([name, host]) => describe(name, host, directory)),
    describe(result.data.server ?? '', result.data, directory),
  ];
}

/** The registry itself, with nothing said about it. */
export function plainHost(
  certificates: Partial<Pick<HostDescription, 'ca' | 'client'>> = {},
): HostDescription {
  return {
    url: undefined,
    capabilities: new Set(ALL),
    ca: certificates.ca ?? [],
    client: certificates.client ?? [],
    skipVerify: undefined,
    headers: {},
    connectTimeoutMs: undefined,
  };
}

function describe(name: string, host: z.output<typeof hostSchema>, directory: string): HostDescription {
  const absolute = (file: string): string => path.resolve(directory, file);
  const { capabilities = [] } = host;
  return {
    url: name === '' ? undefined : baseUrl(name, host.override_path === true),
    capabilities: new Set(capabilities.length === 0 ? ALL : capabilities),
    ca: (host.ca ?? []).map(absolute),
    client: (host.client ?? []).map((entry) =>
      typeof entry === 'string'
        ? { certificate: absolute(entry), key: undefined }
        : { certificate: absolute(entry[0]), key: absolute(entry[1]) },
    ),
    skipVerify: host.skip_verify,
    headers: Object.fromEntries(
      Object.entries(host.header ?? {}).map(([key, value]) => [key.toLowerCase(), value]),
    ),
    connectTimeoutMs: host.dial_timeout,
  };
}

/** The root of the API, with "/" at its end: `/v2/` is added unless it is there or `override_path` says it is not wanted. */
function baseUrl(name: string, overridePath: boolean): URL {
  const text = name.startsWith('http') ? name : `https://${name}`;
  const where = `host ${JSON.stringify(name.replace(/\/\/[^/@]*@/, '//').slice(0, 200))}`;
  if (!URL.canParse(text)) throw new HostsFileError(`${where} is no URL`);
  const url = new URL(text);
  if (url.protocol !== 'http:' && url.protocol !== 'https:') {
    throw new HostsFileError(`${where}: expected http:// or https://`);
  }
  if (url.username !== '' || url.password !== '') {
    throw new HostsFileError(
      `${where} has a user name in it; credentials belong in a credential source or a header`,
    );
  }
  url.search = '';
  url.hash = '';
  const root = path.posix.normalize(url.pathname).replace(/\/+$/, '');
  url.pathname = overridePath || root.endsWith('/v2') ? `${root}/` : `${root}/v2/`;
  return url;
}
