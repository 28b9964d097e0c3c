/**
 * The kubelet's credential-provider plugins (Kubernetes, "Configure a kubelet image credential provider"): programs
 * that a CredentialProviderConfig names, asked with the image's name and answering with credentials by registry.
 *
 * The same configuration and programs as the kubelet's are used. Providers that need a token of the pod's service account
 * cannot be asked: only the kubelet can have one.
 */
import { readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { LRUCache } from 'lru-cache';
import { z } from 'zod';
import { matchingKeys } from './credential-key.js';
import { PasswordCredentials, type Credentials, type CredentialSource } from './credentials.js';
import { parseGoDuration } from './go-duration.js';
import { isDockerHub } from './credential-key.js';
import { parseJson, printable } from './registry-error.js';
import { runProgram } from './run-program.js';

const EXEC_API = /^credentialprovider\.kubelet\.k8s\.io\/v1(?:beta1|alpha1)?$/;
const MAX_FILE = 1_048_576;
/** How long a provider that failed is not run again for the same image, in milliseconds. */
const FAILED_KEPT = 10_000;

const duration = z.string().transform((text, context) => {
  try {
    return parseGoDuration(text);
  } catch {
    context.addIssue({ code: 'custom', message: 'expected a duration such as "12h"' });
    return z.NEVER;
  }
});
const providerSchema = z.object({
  name: z
    .string()
    .regex(/^[\w.-]{1,200}$/)
    .refine((name) => name !== '.' && name !== '..'),
  matchImages: z.array(z.string().min(1)).min(1).max(1000),
  defaultCacheDuration: duration,
  apiVersion: z.string().regex(EXEC_API),
  args: z.array(z.string()).optional(),
  env: z.array(z.object({ name: z.string().min(1), value: z.string() })).optional(),
  tokenAttributes: z.unknown().optional(),
});
const configSchema = z.object({
  kind: z.literal('CredentialProviderConfig'),
  providers: z.array(providerSchema).max(100),
});
const responseSchema = z.object({
  kind: z.literal('CredentialProviderResponse'),
  cacheKeyType: z.enum(['Image', 'Registry', 'Global']),
  cacheDuration: duration.nullish(),
  auth: z.record(z.string(), z.object({ username: z.string(), password: z.string() })).nullish(),
});
type Provider = z.infer<typeof providerSchema>;
type Auth = NonNullable<z.infer<typeof responseSchema>['auth']>;

export interface CredentialProvidersOptions {
  /** The kubelet's `--image-credential-provider-config`. */
  readonly config: string;
  /** The kubelet's `--image-credential-provider-bin-dir`. */
  readonly directory: string;
  readonly timeoutMs: number;
  /** Called when something cannot be used, with a sentence that says why. */
  readonly onProblem?: (problem: string) => void;
}

export class CredentialProviders implements CredentialSource {
  readonly #options: CredentialProvidersOptions;
  readonly #onProblem: (problem: string) => void;
  #version = '';
  #providers: readonly Provider[] = [];
  /** Answers by provider and what the provider says they are for. In memory alone. */
  readonly #answers = new LRUCache<string, Auth>({ max: 1000 });
  readonly #running = new Map<string, Promise<Auth>>();

  constructor(options: CredentialProvidersOptions) {
    this.#options = options;
    this.#onProblem = options.onProblem ?? (() => undefined);
  }

  /** Of every provider that is for the image, in the order of the configuration. */
  async lookup(host: string, repository: string): Promise<readonly Credentials[]> {
    await this.#refresh();
    const all: Credentials[] = [];
    for (const provider of this.#matching(host, repository)) {
      const auth = await this.#ask(provider, host, repository);
      for (const key of matchingKeys(Object.keys(auth), host, repository)) {
        const found = auth[key];
        if (found !== undefined) all.push(new PasswordCredentials(found.username, found.password));
      }
    }
    return all;
  }

  refused(host: string, repository: string): boolean {
    let any = false;
    for (const provider of this.#matching(host, repository)) {
      for (const key of cacheKeys(provider, host, repository)) any = this.#answers.delete(key) || any;
    }
    return any;
  }

  #matching(host: string, repository: string): readonly Provider[] {
    return this.#providers.filter(
      ({ matchImages }) => matchingKeys(matchImages, host, repository).length > 0,
    );
  }

  async #ask(provider: Provider, host: string, repository: string): Promise<Auth> {
    for (const key of cacheKeys(provider, host, repository)) {
      const known = this.#answers.get(key);
      if (known !== undefined) return known;
    }
    // Docker Hub is "docker.io" to the kubelet too.
    const image = `${isDockerHub(host) ? 'docker.io' : host}/${repository}`;
    const flight = JSON.stringify([provider.name, image]);
    let running = this.#running.get(flight);
    if (running === undefined) {
      running = this.#run(provider, image, host, repository).finally(() => this.#running.delete(flight));
      this.#running.set(flight, running);
    }
    return running;
  }

  async #run(provider: Provider, image: string, host: string, repository: string): Promise<Auth> {
    const keys = cacheKeys(provider, host, repository);
    const program = path.join(this.#options.directory, provider.name);
    const fail = (why: string): Auth => {
      this.#onProblem(`${why}; it was asked for ${image}`);
      this.#answers.set(keys[0], {}, { ttl: FAILED_KEPT });
      return {};
    };
    let output: string;
    try {
      const result = await runProgram(program, {
        parameters: provider.args ?? [],
        input: JSON.stringify({ kind: 'CredentialProviderRequest', apiVersion: provider.apiVersion, image }),
        environment: Object.fromEntries((provider.env ?? []).map(({ name, value }) => [name, value])),
        timeoutMs: this.#options.timeoutMs,
      });
      if (result.code !== 0) return fail(`${program} ended with status ${result.code}`);
      output = result.output;
    } catch (error) {
      return fail(error instanceof Error ? error.message : String(error));
    }
    const response = responseSchema.safeParse(parseJson(output));
    if (!response.success) {
      const place = response.error.issues[0]?.path.map(String).join('.') ?? '';
      return fail(`${program} gave no CredentialProviderResponse of v1${place === '' ? '' : ` (${place})`}`);
    }
    const { auth, cacheDuration, cacheKeyType } = response.data;
    const life = cacheDuration ?? provider.defaultCacheDuration;
    if (life > 0) {
      const key = keys[['Image', 'Registry', 'Global'].indexOf(cacheKeyType)] ?? keys[0];
      // A tenth before its end: whoever uses it needs time.
      this.#answers.set(key, auth ?? {}, {
        ttl: Math.max(1, Math.floor(life - Math.min(life / 10, 60_000))),
      });
    }
    return auth ?? {};
  }

  async #refresh(): Promise<void> {
    const { config } = this.#options;
    let version: string;
    let providers: readonly Provider[] = [];
    try {
      const status = await stat(config);
      version = `${status.ino} ${status.size} ${status.mtimeMs}`;
      if (version === this.#version) return;
      if (status.size > MAX_FILE)
        throw new Error(`it has ${status.size} bytes; at most ${MAX_FILE} are read`);
      providers = await this.#parse(await readFile(config, 'utf8'));
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException;
      version = `error ${code ?? message}`;
      if (version === this.#version) return;
      this.#onProblem(`${config} cannot be read (${code ?? message}); no credential provider is asked`);
    }
    this.#version = version;
    this.#providers = providers;
    this.#answers.clear();
  }

  async #parse(text: string): Promise<readonly Provider[]> {
    const { config } = this.#options;
    // Few nodes have such a file, and loading this takes its part of every start.
    const { parse: parseYaml, YAMLError } = await import('yaml');
    let document: unknown;
    try {
      // JSON is YAML too. Warnings would go to standard error, and may quote the text.
      document = parseYaml(text, { logLevel: 'error' });
    } catch (error) {
      // A ReferenceError for aliases that make too much of too little.
      if (!(error instanceof YAMLError) && !(error instanceof ReferenceError)) throw error;
      const place = error instanceof YAMLError ? error.linePos?.[0] : undefined;
      const where = place === undefined ? '' : `line ${place.line}, column ${place.col}: `;
      this.#onProblem(`${config}: ${where}this is not YAML; no credential provider is asked`);
      return [];
    }
    const result = configSchema.safeParse(document);
    if (!result.success) {
      const place = result.error.issues[0]?.path.map(String).join('.') ?? '';
      this.#onProblem(`${config}: ${printable(place, 200)} is not as a CredentialProviderConfig has it`);
      return [];
    }
    return result.data.providers.filter(({ name, tokenAttributes }) => {
      if (tokenAttributes === undefined || tokenAttributes === null) return true;
      this.#onProblem(
        `${config}: ${name} needs tokens of service accounts, which only the kubelet has; it is not asked`,
      );
      return false;
    });
  }
}

/** In the order Image, Registry, Global. */
function cacheKeys({ name }: Provider, host: string, repository: string): readonly [string, string, string] {
  return [JSON.stringify([name, host, repository]), JSON.stringify([name, host]), JSON.stringify([name])];
}
