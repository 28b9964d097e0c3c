/**
 * Readers above a registry behind the fault proxy, each through the stages that the product reads with (range, retry,
 * cache with digests of its spans), and what became of their reads.
 */
import { createHash, randomBytes } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import type { IncomingMessage } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pino } from 'pino';
import { ReadError } from '../../blobserve/readers/blob-reader.js';
import { CacheReader } from '../../blobserve/readers/cache.js';
import { RegistryRangeReader } from '../../blobserve/readers/registry-range.js';
import { RetryReader } from '../../blobserve/readers/retry.js';
import { parseReference } from '../../blobserve/registry/reference.js';
import { RegistryClient, type RegistryClientOptions } from '../../blobserve/registry/registry-client.js';
import { DockerRegistry } from '../docker-registry.js';
import { patience } from '../patience.js';
import { FaultProxy, type Fault, type TlsIdentity } from './fault-proxy.js';

export const SPAN = 65_536;
const SPANS = 64;
const REPOSITORY = 'faults/blob';
/** Connections to a host; what a reader may have open at the proxy and its storage address together is twice that. */
export const CONNECTIONS = 8;

/** Time limits that only what hangs can reach, also on a machine that is busy; and short ones, for what hangs. */
const LONG = {
  connectTimeoutMs: patience(15_000),
  headersTimeoutMs: patience(15_000),
  bodyTimeoutMs: patience(15_000),
  requestTimeoutMs: patience(60_000),
};
const SHORT = {
  connectTimeoutMs: patience(2000),
  headersTimeoutMs: patience(500),
  bodyTimeoutMs: patience(500),
  requestTimeoutMs: patience(2500),
};

/** A real registry with one blob of random bytes. */
export interface Origin {
  readonly registry: DockerRegistry;
  readonly blob: Buffer;
  readonly digest: string;
}

export async function startOrigin(): Promise<Origin> {
  const registry = await DockerRegistry.start();
  const blob = randomBytes(SPANS * SPAN - 1234);
  return { registry, blob, digest: await registry.pushBlob(REPOSITORY, blob) };
}

export interface CaseOptions {
  readonly origin: Origin;
  readonly choose: (
    request: IncomingMessage,
    range: readonly [number, number] | undefined,
  ) => Fault | undefined;
  readonly identity?: () => TlsIdentity | 'garbage';
  readonly client?: RegistryClientOptions;
  /** With short time limits, for faults that are about them. */
  readonly hurry?: boolean | undefined;
  /** How many spans are read, each by a read of its own. */
  readonly reads: number;
  /** Reads at the same time. */
  readonly parallel: number;
  /** Of each read, in milliseconds. */
  readonly deadlineMs: number;
  readonly random: () => number;
}

export interface Outcome {
  readonly reads: number;
  readonly wrongBytes: number;
  readonly errors: readonly ReadError[];
  readonly requests: number;
  readonly worstMs: number;
  readonly mostSockets: number;
  /** Connections that the proxy still had after the client was closed. */
  readonly socketsLeft: number;
  /** `host:port` of the proxy and of the storage service behind it. */
  readonly hosts: readonly string[];
}

/** Reads by chance-chosen spans of the blob, each once. */
export async function readThroughFaults(options: CaseOptions): Promise<Outcome> {
  const { origin, random } = options;
  const { blob, digest } = origin;
  const proxy = await FaultProxy.start({
    upstream: origin.registry.host,
    choose: options.choose,
    ...(options.identity === undefined ? {} : { identity: options.identity }),
  });
  const directory = await mkdtemp(path.join(tmpdir(), 'faulty-reads-'));
  const client = new RegistryClient({
    ...(options.hurry === true ? SHORT : LONG),
    connectionsPerHost: CONNECTIONS,
    ...options.client,
  });
  const reference = parseReference(`${proxy.host}/${REPOSITORY}:1`);
  const range = new RegistryRangeReader({ client, reference, digest, size: blob.length });
  const retry = new RetryReader(range, {
    readDeadlineMs: options.deadlineMs,
    initialDelayMs: 50,
    maxDelayMs: 1000,
  });
  const cache = await CacheReader.open(retry, {
    dir: directory,
    digest,
    name: `blob ${digest}`,
    spanSize: SPAN,
    maxRangeBytes: SPAN,
    verify: (span, bytes) => {
      const right = blob.subarray(span * SPAN, span * SPAN + bytes.length);
      if (sha256(bytes) === sha256(right)) return true;
      throw new ReadError(
        'corrupt',
        `blob ${digest} of ${reference.host}/${REPOSITORY}: ${bytes.length} bytes at ${span * SPAN}: they do not have the digest of span ${span}`,
      );
    },
    log: pino({ level: 'silent' }),
  });
  const errors: ReadError[] = [];
  let wrongBytes = 0;
  let worstMs = 0;
  const spans = shuffled(SPANS, random).slice(0, options.reads);
  const readOne = async (span: number): Promise<void> => {
    const length = Math.min(SPAN, blob.length - span * SPAN);
    const target = Buffer.alloc(length, 0xee);
    const started = performance.now();
    try {
      await cache.read(target, span * SPAN);
      const right = blob.subarray(span * SPAN, span * SPAN + length);
      for (let i = 0; i < length; i++) if (target[i] !== right[i]) wrongBytes++;
    } catch (error) {
      if (!(error instanceof ReadError)) throw error;
      errors.push(error);
    }
    worstMs = Math.max(worstMs, performance.now() - started);
  };
  const reads = spans.length;
  const reader = async (): Promise<void> => {
    for (let span = spans.pop(); span !== undefined; span = spans.pop()) await readOne(span);
  };
  try {
    await Promise.all(Array.from({ length: options.parallel }, reader));
  } finally {
    await cache.close();
    await client.close();
  }
  const { requests, mostSockets } = proxy;
  // Closing takes a moment on the other side.
  const until = performance.now() + patience(5000);
  while (proxy.openSockets > 0 && performance.now() < until)
    await new Promise((resolve) => setTimeout(resolve, 10));
  const socketsLeft = proxy.openSockets;
  const hosts = [proxy.host, proxy.storageHost];
  await proxy.close();
  await rm(directory, { recursive: true, force: true });
  return { reads, wrongBytes, errors, requests, worstMs, mostSockets, socketsLeft, hosts };
}

function sha256(bytes: Buffer): string {
  return createHash('sha256').update(bytes).digest('hex');
}

function shuffled(length: number, random: () => number): number[] {
  const all = Array.from({ length }, (_, i) => i);
  for (let i = length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [all[i], all[j]] = [all[j] ?? 0, all[i] ?? 0];
  }
  return all;
}
