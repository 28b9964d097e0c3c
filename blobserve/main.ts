#!/usr/bin/env node
/**
 * Blobserve, the data plane: started and watched by the snapshotter, answering page faults and nothing else.
 */
import path from 'node:path';
import process from 'node:process';
import * as grpc from '@grpc/grpc-js';
import { Command, Option } from 'commander';
import { loadConfiguration, type Configuration } from '../daemon/configuration.js';
import { keepMemoryOutOfCoreDumps } from '../daemon/core-dump.js';
import { faultPoint } from '../daemon/fault-point.js';
import { layout as layoutOf } from '../daemon/layout.js';
import { createLogger, type Logger } from '../daemon/log.js';
import { closeTracing, isTracing, openTracing } from '../daemon/tracing.js';
import { VERSION } from '../daemon/version.js';
import { control } from '../proto/messages.js';
import { controlService } from '../proto/service.js';
import { FuseBackend } from './attach/fuse-backend.js';
import { NbdBackend } from './attach/nbd-backend.js';
import { controlImplementation } from './control-service.js';
import { ControlSocket } from './control-socket.js';
import { LayerPaths } from './data-path.js';
import { FirstReads } from './first-reads.js';
import { GarbageCollection } from './garbage.js';
import { readGivenFiles } from './given-files.js';
import { ImageStarts } from './image-starts.js';
import { LayerBlobs } from './layer-blobs.js';
import { CONFIRM, LayerIndexer } from './layer-indexer.js';
import { isClassic, LayerLookup } from './layer-lookup.js';
import { LayerServer } from './layer-server.js';
import { MaterialisedLayers } from './materialised-layers.js';
import { Prefetches } from './prefetch.js';
import { recordedOrder } from './prefetch-order.js';
import { PrefetchRecords } from './prefetch-records.js';
import { PublishedIndexes } from './published/published-indexes.js';
import { EntrypointReads } from './start/entrypoint-reads.js';
import { StartRecordings } from './start-recordings.js';
import { Verifications } from './verification.js';
import { openRegistryClient } from './open-registry-client.js';
import { PullCredentials } from './registry/pull-credentials.js';
import { rehearseDevice, rehearseExchange, rehearseTrust, rehearseUntil } from './rehearsal.js';
import { toldToServe } from './told-to-serve.js';

interface CommandLine {
  config?: string;
  root: string;
  logLevel?: string;
  attach: 'nbd' | 'fuse';
  attachReason: string;
  fuseDescriptor?: string;
}

/** Milliseconds after which a process that serves nothing rehearses: one that is to serve again is told of its layers by then. */
const REHEARSE_AFTER = 100;
/** Milliseconds an orderly end may take: what was fetched is written down in well under one second. */
const STOP_TIMEOUT = 5_000;

async function openBackend(
  options: CommandLine,
  configuration: Configuration,
  fuseMountPoint: string,
  log: Logger,
): Promise<NbdBackend | FuseBackend> {
  if (options.attach === 'nbd') {
    return NbdBackend.open({
      log,
      times: {
        deadConnectionSeconds: Math.round(configuration.nbd.dead_connection_timeout / 1000),
        ioTimeoutMs: configuration.nbd.io_timeout,
      },
    });
  }
  return new FuseBackend(Number(options.fuseDescriptor), fuseMountPoint, {
    attachTimeoutMs: configuration.fuse.attach_timeout,
    log,
  });
}

async function main(): Promise<void> {
  const options = new Command('blobserve')
    .description("erofs-nbd's data plane; started by erofs-nbd-snapshotter")
    .version(VERSION)
    .option('--config <file>')
    .requiredOption('--root <directory>')
    .option('--log-level <level>')
    .addOption(new Option('--attach <backend>').choices(['nbd', 'fuse']).makeOptionMandatory())
    .option('--attach-reason <text>', '', '')
    .option('--fuse-descriptor <number>')
    .parse()
    .opts<CommandLine>();
  const configuration = loadConfiguration(options.config, {
    root: options.root,
    ...(options.logLevel === undefined ? {} : { logLevel: options.logLevel }),
  });
  const told = toldToServe();
  const log = createLogger('blobserve', configuration.log.level, configuration.log.format);
  keepMemoryOutOfCoreDumps(log);
  await openTracing('erofs-nbd-blobserve', configuration, log);
  const layout = layoutOf(configuration.root);
  const fuseMountPoint = options.attach === 'fuse' ? layout.fuse : '';
  const backend = await openBackend(options, configuration, fuseMountPoint, log);
  const pulls = new PullCredentials();
  const client = openRegistryClient(configuration, log, pulls);
  const lookup = new LayerLookup(client);
  const { index, prefetch, cache } = configuration;
  const indexer = new LayerIndexer({
    directory: layout.index,
    workers: index.workers,
    spanSize: index.span_size,
    maxUncompressedBytes: index.max_uncompressed,
    maxEntries: index.max_entries,
    log,
  });
  const published = new PublishedIndexes({
    registry: client,
    manifest: (image, signal) => lookup.manifest(image, signal),
    // What refers to an image is anchored in nothing that the image's digest covers.
    trust:
      configuration.integrity.verify === 'strict' && index.trust === 'referrers' ? 'pinned' : index.trust,
    sources: index.sources,
    lookupTimeoutMs: index.lookup_timeout,
    maxBytes: index.max_published,
    maxUncompressedBytes: index.max_uncompressed,
    maxEntries: index.max_entries,
    workers: index.workers,
    maxSpans: prefetch.max_spans,
    log,
  });
  const records = new PrefetchRecords(layout.prefetch, { maxSpans: prefetch.max_spans });
  const blobs = new LayerBlobs({
    configuration,
    cacheDirectory: layout.cache,
    digestsDirectory: layout.digests,
    client,
    sweepElsewhere: async () => {
      await indexer.sweep(cache.keep_unused);
      await records.sweep(cache.keep_unused, (digest) => starts.isOpen(digest));
    },
    log,
  });
  const materialised = new MaterialisedLayers({
    cacheDirectory: layout.cache,
    enabled: configuration.cache.materialise,
    delayMs: configuration.background.delay,
    space: blobs.space,
    log,
  });
  const given = readGivenFiles(layout.givenFiles);
  const paths = new LayerPaths({
    configuration,
    blobs,
    indexer,
    published,
    materialised,
    given: given ?? {},
    log,
  });
  const firstReads = new FirstReads({
    rangeBytes: prefetch.range,
    requests: prefetch.requests,
    maxBytes: prefetch.max_bytes,
    room: () => (blobs.space.scarce ? -1 : blobs.space.roomOfBlobs()),
    log,
  });
  const starts: ImageStarts = new ImageStarts({
    configuration,
    firstReads,
    records,
    published,
    lookup,
    blobs,
    // Whoever mounts by hand starts nothing.
    ...(given === undefined && {
      entrypoints: new EntrypointReads({ configuration, lookup, firstReads, log }),
    }),
    log,
  });
  const recordings = prefetch.record
    ? new StartRecordings({
        durationMs: prefetch.record_time,
        maxBytes: prefetch.max_bytes,
        maxSpans: prefetch.max_spans,
        rangeBytes: prefetch.range,
        layer: (digest) => starts.layer(digest),
        keep: async (manifestDigest, command, list) => {
          const kept = await records.keep(manifestDigest, command, list);
          if (kept) starts.recorded(manifestDigest);
          return kept;
        },
        log,
      })
    : undefined;
  const garbage = new GarbageCollection({
    indexDirectories: [layout.index, path.join(layout.index, CONFIRM)],
    space: blobs.space,
    records,
    isOpen: (digest) => blobs.opened(digest).length > 0,
    expected: () => lookup.expected(),
    log,
  });
  const indexLayer = (source: control.LayerSource.$Properties) =>
    garbage.using(source.layerDigest ?? '', () => paths.index(source));
  /** The layers of an image are indexed side by side: whoever wants one will want the others next. */
  const indexSiblings = async (source: control.LayerSource.$Properties): Promise<void> => {
    const layers = await lookup.layers(source, '');
    const from = layers.findIndex(({ layerDigest }) => layerDigest === source.layerDigest);
    const classic = layers.slice(from + 1).filter(({ kind }) => isClassic(kind));
    await Promise.all(classic.map(indexLayer));
  };
  /** Describes a layer that is about to be pulled, and begins beside that with what its image will need next. */
  const describe = async (
    source: control.LayerSource.$Properties,
    platform: string,
  ): Promise<control.DescribeResponse.$Properties> => {
    const describing = lookup.describe(source, platform);
    // Behind the request for the manifest, which both want.
    if (given === undefined) published.expect(source.imageRef ?? '', source.manifestDigest ?? '');
    const described = await describing;
    if (given === undefined) void starts.expected(described.source ?? source, index.build);
    return described;
  };
  const server = new LayerServer({
    backend,
    ...(isTracing() && { slowReadMs: configuration.tracing.slow_read }),
    openLayer: (source, checked, signal) => {
      // Whoever mounts by hand asks for all layers that are wanted at once.
      if (!checked && isClassic(source.kind) && given === undefined) {
        // Whoever attaches those layers is told what went wrong with them.
        indexSiblings(source).catch((error: unknown) => log.debug({ err: error }, 'not indexed ahead'));
      }
      return garbage.using(source.layerDigest ?? '', async () =>
        starts.opened(source, await paths.open(source, checked, signal), checked),
      );
    },
    log,
  });
  const prefetches = new Prefetches({
    lookup,
    blobs,
    index: index.build ? indexLayer : undefined,
    first: ({ layerDigest, kind }) => {
      const record = server.readingOf(layerDigest ?? '');
      return record === undefined ? [] : recordedOrder(record, kind ?? control.LayerKind.OTHER);
    },
    rangeBytes: configuration.fetch.max_range,
    log,
  });
  const verifications = new Verifications({
    lookup,
    blobs,
    indexer,
    materialised,
    using: (digest, work) => garbage.using(digest, work),
    cacheDirectory: layout.cache,
    log,
  });
  const controlServer = new grpc.Server({ 'grpc.max_receive_message_length': 4 * 2 ** 20 });

  // A thread may be waiting in a read of /dev/fuse, so that leaving takes process.reallyExit's way: a signal.
  const leave = (): void => process.kill(process.pid, 'SIGKILL') as unknown as void;
  let stopping = false;
  const stop = (reason: string): void => {
    if (stopping) return;
    stopping = true;
    log.info({ reason }, 'ending; the kernel keeps its devices for the next process');
    setTimeout(leave, STOP_TIMEOUT).unref();
    // In order, so that the answer to a Shutdown still leaves; calls that wait for a registry are not waited for.
    controlServer.tryShutdown(() => undefined);
    socket.remove();
    firstReads.close();
    recordings?.close();
    Promise.all([prefetches.close(), verifications.close()])
      .then(() => server.close())
      .then(() => blobs.close())
      .then(() => client.close())
      .then(closeTracing)
      .catch((error: unknown) => log.error({ err: error }, 'not everything was closed'))
      .finally(leave);
  };

  controlServer.addService(
    controlService,
    controlImplementation({
      server,
      hosts: () => client.hosts(),
      describe,
      prefetches,
      recordings,
      verifications,
      garbage,
      pulls,
      backend: options.attach,
      backendReason: options.attachReason,
      fuseMountPoint,
      fuseDescriptor: options.fuseDescriptor === undefined ? -1 : Number(options.fuseDescriptor),
      root: layout.root,
      onShutdown: () => stop('asked to'),
      log,
    }),
  );
  // FUSE's connection has one reader, the process that serves: there is no second one to rehearse with.
  const devices = options.attach === 'nbd' ? [rehearseDevice] : [];
  await rehearseUntil(told, [rehearseExchange, ...devices, rehearseTrust], log);
  const socket = await ControlSocket.bind(controlServer, layout.controlSocket);
  // A process that stands by waits here, with all that needs no device behind it.
  if (!(await told)) {
    socket.remove();
    return leave();
  }
  if (backend instanceof FuseBackend) backend.begin();
  await socket.publish();
  faultPoint('control-open');
  process.on('SIGTERM', () => stop('SIGTERM'));
  // Ctrl-C in a terminal goes to the whole group; the snapshotter decides.
  process.on('SIGINT', () => undefined);
  process.on('SIGHUP', () => undefined);
  process.on('uncaughtException', (error) => {
    log.fatal({ err: error }, 'a fault of the program: ending; the snapshotter starts the next process');
    process.exit(70);
  });
  // Nobody waits for it: a cache that is full is served from all the same.
  void blobs.start();
  // A process that has nobody waiting for it is ready for the first pull.
  setTimeout(() => {
    if (server.size > 0) return;
    Promise.all([rehearseExchange(), rehearseTrust()]).catch((error: unknown) =>
      log.warn({ err: error }, 'the rehearsal failed'),
    );
  }, REHEARSE_AFTER).unref();
  log.info({ version: VERSION, backend: options.attach, socket: layout.controlSocket }, 'serving');
}

main().catch((error: unknown) => {
  process.stderr.write(
    `blobserve: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`,
  );
  process.exit(1);
});
