/**
 * The snapshotter's parts put together, in the order they come up and go down.
 *
 * Up: lock, database, socket (calls are answered from here on), then, behind it, data plane and recovery: a call that
 * needs a layer waits for that layer, all others do not. Down: socket, work under way; the data plane goes on as long as
 * anything is attached.
 */
import { mkdir } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import type { Configuration } from '../daemon/configuration.js';
import { keepMemoryOutOfCoreDumps } from '../daemon/core-dump.js';
import { faultPoint } from '../daemon/fault-point.js';
import { layout as layoutOf, type Layout } from '../daemon/layout.js';
import type { Logger } from '../daemon/log.js';
import { VERSION } from '../daemon/version.js';
import { openDatabase, type MetadataDatabase } from '../metadata/database.js';
import { LayerStore } from '../metadata/layers.js';
import { SnapshotStore } from '../metadata/snapshots.js';
import { nodeService, snapshotsService } from '../proto/service.js';
import type { BlobServeProcess } from './blobserve-process.js';
import { ContainerStarts } from './container-starts.js';
import { ContainerdClient } from './containerd-client.js';
import { CredentialRelay } from './credential-relay.js';
import { closeDataPlane, openDataPlane } from './data-plane.js';
import { diskUsage } from './disk-usage.js';
import { ImageDiscovery } from './image-discovery.js';
import { imageService, ImageServiceProxy } from './image-service.js';
import { LayerAttachments } from './layer-attachments.js';
import { LayerFinder } from './layer-finder.js';
import { snapshotterFamilies } from './metrics.js';
import { MetricsServer } from './metrics-server.js';
import { Mounter } from './mounter.js';
import { kernelOverlayOptions } from './overlay.js';
import { nodeImplementation } from './node-service.js';
import { PluginName } from './plugin-name.js';
import { snapshotsImplementation } from './service.js';
import type { DescriptorStore } from './service-manager.js';
import { Snapshotter } from './snapshotter.js';
import { listen } from './socket.js';

export interface DaemonOptions {
  readonly configuration: Configuration;
  /** Arguments the data plane is started with as well. */
  readonly sharedArguments: readonly string[];
  /** Replace the running data plane, of whichever version it is. */
  readonly handover: boolean;
  /** Who holds descriptors for the next process. */
  readonly store: DescriptorStore;
  readonly log: Logger;
}

/** Milliseconds that calls under way get to end before the daemon does. */
const STOP_TIMEOUT = 5_000;
/** Milliseconds for which the disk space of the cache is remembered: all its files are looked at to know it. */
const CACHE_USAGE_AGE = 15_000;
/** containerd's own limit for messages is 16 MiB. */
const MESSAGE_MAX = 16 * 2 ** 20;

/** Containers or images need what was to be taken away. */
export class LayersInUseError extends Error {
  constructor(layers: number, root: string) {
    super(
      `${layers} layers in ${root} are used by snapshots: nothing was detached. Remove the containers and images of this ` +
        'snapshotter from containerd, in every namespace, and try again. When that containerd is gone for good, ' +
        '--teardown --force detaches them: a container that still runs on them then gets EIO',
    );
  }
}

export class Daemon {
  readonly #options: DaemonOptions;
  readonly #layout: Layout;
  readonly #log: Logger;
  readonly #mounter: Mounter;
  #database: MetadataDatabase | undefined;
  #layers: LayerStore | undefined;
  #server: grpc.Server | undefined;
  #snapshotter: Snapshotter | undefined;
  #dataPlane: Promise<BlobServeProcess> | undefined;
  #stopping = false;
  #containerd: ContainerdClient | undefined;
  #metrics: MetricsServer | undefined;
  #credentials: CredentialRelay | undefined;
  #images: ImageServiceProxy | undefined;

  constructor(options: DaemonOptions) {
    this.#options = options;
    this.#layout = layoutOf(options.configuration.root);
    this.#log = options.log;
    this.#mounter = new Mounter({ timeoutMs: options.configuration.mount.timeout });
  }

  /** Resolves when the socket answers; recovery goes on behind it. */
  async start(): Promise<void> {
    const { configuration } = this.#options;
    const { attachments, snapshotter } = await this.#open();
    await snapshotter.recover();
    const server = new grpc.Server({ 'grpc.max_receive_message_length': MESSAGE_MAX });
    server.addService(
      snapshotsService,
      snapshotsImplementation(snapshotter, new PluginName(this.#layout.root), this.#log),
    );
    server.addService(
      nodeService,
      nodeImplementation({
        root: this.#layout.root,
        snapshotter,
        layerDigests: () => this.#layers?.digests() ?? [],
        dataPlane: () => this.#dataPlaneOf(attachments),
        log: this.#log,
      }),
    );
    this.#serveImages(server);
    await listen(server, configuration.address);
    faultPoint('socket-open');
    this.#server = server;
    this.#log.info({ version: VERSION, address: configuration.address, root: this.#layout.root }, 'ready');
    await this.#startMetrics();
    void this.#recover(attachments);
  }

  /** The kubelet's image service, in front of containerd's. */
  #serveImages(server: grpc.Server): void {
    const { registry, containerd } = this.#options.configuration;
    const relay = this.#credentials;
    if (!registry.cri_image_service || relay === undefined) return;
    this.#images = new ImageServiceProxy({ address: containerd.address, relay, log: this.#log });
    server.addService(imageService, this.#images.implementation());
    this.#log.info({ containerd: containerd.address }, 'the image service of CRI is passed on to containerd');
  }

  /** Without them containers run as well: an address that is taken is no reason not to start. */
  async #startMetrics(): Promise<void> {
    const { address } = this.#options.configuration.metrics;
    if (address === undefined) return;
    const cacheBytes = remembered(CACHE_USAGE_AGE, async () => (await diskUsage(this.#layout.cache)).size);
    try {
      this.#metrics = await MetricsServer.start({
        address,
        families: async () =>
          snapshotterFamilies({
            layers: this.#layers?.devices().length ?? 0,
            cacheBytes: await cacheBytes(),
          }),
        dataPlane: async (timeoutMs) => (await this.#dataPlane)?.client.metrics(timeoutMs),
        log: this.#log,
      });
      this.#log.info({ address }, 'metrics are served');
    } catch (error) {
      this.#log.error({ err: error }, 'metrics are not served; everything else works');
    }
  }

  /** Ends this process's part. The data plane goes on when anything is attached. */
  async stop(): Promise<void> {
    this.#stopping = true;
    await this.#metrics?.close();
    await this.#stopServer();
    const settled = await Promise.race([
      this.#settled().then((dataPlane) => ({ dataPlane })),
      sleep(STOP_TIMEOUT, undefined, { ref: false }),
    ]);
    if (settled === undefined) {
      this.#log.warn('work is still under way and is left as it is; the next start settles it');
      return;
    }
    const { dataPlane } = settled;
    if (dataPlane !== undefined) {
      if (this.#layers?.devices().length === 0) {
        await closeDataPlane(dataPlane, this.#options.store, this.#layout, this.#log).catch(
          (error: unknown) =>
            this.#log.warn(
              { err: error },
              'the data plane cannot be ended now: it goes on, and the next start finds it',
            ),
        );
      }
      dataPlane.release();
    }
    this.#close();
  }

  async #settled(): Promise<BlobServeProcess | undefined> {
    await this.#snapshotter?.settled();
    return this.#dataPlane?.catch(() => undefined);
  }

  /**
   * Unmounts and detaches every layer and ends the data plane, without serving. Snapshots that there are all the same stay in
   * the database, and their layers are attached again when they are wanted.
   *
   * @param force also when snapshots use layers. A container that runs on them loses its files: an overlay keeps no mount
   * below it from being unmounted, so the kernel does not say that it is in use
   * @throws {LayersInUseError} before anything is touched
   */
  async teardown(force: boolean): Promise<void> {
    const { attachments } = await this.#open();
    const used = this.#layers?.countUsed() ?? 0;
    if (used > 0 && !force) {
      this.#close();
      throw new LayersInUseError(used, this.#layout.root);
    }
    const dataPlane = await this.#dataPlaneOf(attachments);
    const failures = await attachments.detachAll();
    if (failures > 0) {
      throw new Error(`${failures} layers are still in use: stop their containers first, then try again`);
    }
    await closeDataPlane(dataPlane, this.#options.store, this.#layout, this.#log);
    dataPlane.release();
    this.#close();
  }

  async #open(): Promise<{ attachments: LayerAttachments; snapshotter: Snapshotter }> {
    const { configuration } = this.#options;
    keepMemoryOutOfCoreDumps(this.#log);
    await mkdir(this.#layout.root, { recursive: true, mode: 0o711 });
    this.#database = openDatabase(this.#layout.root, { address: configuration.address, version: VERSION });
    faultPoint('database-opened');
    const snapshots = new SnapshotStore(this.#database);
    const layers = new LayerStore(this.#database);
    this.#layers = layers;
    const dataPlane = (): Promise<BlobServeProcess> => this.#dataPlaneOf(attachments);
    const attachments: LayerAttachments = new LayerAttachments({
      directory: this.#layout.layers,
      layers,
      dataPlane,
      mounter: this.#mounter,
      log: this.#log,
    });
    // Also when the image service is off: a data plane may hold what came with pulls before.
    this.#credentials = new CredentialRelay({
      keptMs: configuration.registry.cri_credentials_kept,
      call: async (work) => (await dataPlane()).call(work),
      log: this.#log,
    });
    this.#containerd = new ContainerdClient(configuration.containerd.address);
    const overlayOptions = [...(await kernelOverlayOptions()), ...configuration.mount.overlay_options];
    const finder = new LayerFinder({
      dataPlane,
      onError: configuration.on_error,
      indexClassic: configuration.index.build,
      discovery: this.#openDiscovery(this.#containerd),
      discoveryTimeoutMs: configuration.containerd.timeout,
      log: this.#log,
    });
    const snapshotter = new Snapshotter({
      layout: this.#layout,
      snapshots,
      layers,
      attachments,
      finder,
      containerd: this.#containerd,
      starts: configuration.prefetch.record
        ? new ContainerStarts({
            dataPlane,
            containerd: this.#containerd,
            timeoutMs: configuration.containerd.timeout,
            log: this.#log,
          })
        : undefined,
      overlayOptions,
      log: this.#log,
    });
    this.#snapshotter = snapshotter;
    return { attachments, snapshotter };
  }

  #openDiscovery(client: ContainerdClient): ImageDiscovery | undefined {
    const { containerd, registry } = this.#options.configuration;
    const { discover, registries } = containerd;
    if (!discover) return undefined;
    return new ImageDiscovery({
      client,
      // Plain HTTP is a matter of ports too.
      registries: [...registries, ...registry.insecure],
      hostsDirectories: registry.hosts_dir,
      log: this.#log,
    });
  }

  /** The data plane, opened by whoever wants it first; a failure is not kept, so that the next call tries again. */
  #dataPlaneOf(attachments: LayerAttachments): Promise<BlobServeProcess> {
    const credentials = this.#credentials;
    if (credentials === undefined) throw new Error('the data plane is wanted before the daemon is open');
    this.#dataPlane ??= openDataPlane({
      configuration: this.#options.configuration,
      layout: this.#layout,
      args: this.#options.sharedArguments,
      mounter: this.#mounter,
      handover: this.#options.handover,
      credentials,
      store: this.#options.store,
      log: this.#log,
    }).then(
      (dataPlane) => {
        dataPlane.onStarted(() => attachments.serveAgain(dataPlane.client));
        return dataPlane;
      },
      (error: unknown) => {
        this.#dataPlane = undefined;
        throw error;
      },
    );
    return this.#dataPlane;
  }

  /** Until it is done: readers may be waiting, and nobody else tells the data plane what to serve. */
  async #recover(attachments: LayerAttachments): Promise<void> {
    const { attach, restart_backoff_max: longest } = this.#options.configuration.recovery;
    let said = '';
    for (let pause = 100; !this.#stopping; pause = Math.min(pause * 2, longest)) {
      try {
        await this.#dataPlaneOf(attachments);
        await attachments.recover(attach === 'eager');
        return;
      } catch (error) {
        const message = String(error);
        // The same reason for hours is worth one line.
        const level = message === said ? 'debug' : 'error';
        said = message;
        this.#log[level]({ err: error }, 'layers cannot be attached yet; everything else works');
      }
      await sleep(pause, undefined, { ref: false });
    }
  }

  async #stopServer(): Promise<void> {
    const server = this.#server;
    if (server === undefined) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(() => (server.forceShutdown(), resolve()), STOP_TIMEOUT);
      server.tryShutdown(() => (clearTimeout(timer), resolve()));
    });
  }

  #close(): void {
    this.#containerd?.close();
    this.#images?.close();
    this.#mounter.close();
    this.#database?.close();
  }
}

/** What `look` finds, looked at again when it is older than so many milliseconds. */
function remembered<T>(ageMs: number, look: () => Promise<T>): () => Promise<T> {
  let found: Promise<T> | undefined;
  let at = 0;
  return () => {
    if (found === undefined || performance.now() - at > ageMs) {
      at = performance.now();
      found = look();
      found.catch(() => (found = undefined));
    }
    return found;
  };
}
