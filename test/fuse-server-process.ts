/**
 * A process that serves a FUSE connection, inherited as descriptor 3, as its parent says over the IPC channel. Tests use
 * it because the process that looks at a FUSE mount must not be the one that serves it.
 */
import type { AttachedDevice, DeviceReadStatistics } from '../blobserve/attach/backend.js';
import { FuseBackend } from '../blobserve/attach/fuse-backend.js';
import type { BlobReader } from '../blobserve/readers/blob-reader.js';
import { FileReader } from '../blobserve/readers/file.js';

/** [from, to) in bytes of the blob. */
export type Range = readonly [from: number, to: number];

export type ServerCommand =
  | {
      readonly do: 'serve';
      readonly mountPoint: string;
      readonly attachTimeoutMs?: number;
      readonly memoryLimitBytes?: number;
    }
  | {
      readonly do: 'attach';
      readonly layerId: number;
      readonly identifier: string;
      readonly path: string;
      readonly size: number;
      /** Without, every read is answered later, also one whose bytes are at hand. */
      readonly now: boolean;
    }
  /** Reads that touch the range fail, until said otherwise. */
  | { readonly do: 'fail'; readonly layerId: number; readonly range: Range | undefined }
  /** Reads that touch the range are held, until said otherwise; then they go on. */
  | { readonly do: 'hold'; readonly layerId: number; readonly range: Range | undefined }
  /** Answered when so many reads of the layer are being held. */
  | { readonly do: 'await-held'; readonly layerId: number; readonly count: number }
  | { readonly do: 'statistics'; readonly layerId: number }
  | { readonly do: 'detach'; readonly layerId: number }
  | { readonly do: 'close' };

export interface ServerAnswer {
  readonly id: number;
  readonly error?: string;
  readonly device?: { readonly path: string; readonly size: number; readonly reconnected: boolean };
  readonly statistics?: DeviceReadStatistics;
}

const touches = (range: Range | undefined, offset: number, length: number): boolean =>
  range !== undefined && offset < range[1] && offset + length > range[0];

/** Fails and holds reads as told; everything else comes from the reader below. */
class ObedientReader implements BlobReader {
  readonly size: number;
  failing: Range | undefined;
  held = 0;
  #holding: Range | undefined;
  #released: (() => void)[] = [];
  #counted: (() => void)[] = [];

  constructor(
    private readonly next: BlobReader,
    private readonly now: boolean,
  ) {
    this.size = next.size;
  }

  hold(range: Range | undefined): void {
    this.#holding = range;
    if (range === undefined) {
      this.held = 0;
      for (const release of this.#released.splice(0)) release();
    }
  }

  async untilHeld(count: number): Promise<void> {
    while (this.held < count) await new Promise<void>((resolve) => this.#counted.push(resolve));
  }

  async read(target: Buffer, offset: number): Promise<void> {
    if (touches(this.#holding, offset, target.length)) {
      this.held++;
      for (const counted of this.#counted.splice(0)) counted();
      await new Promise<void>((resolve) => this.#released.push(resolve));
    }
    if (touches(this.failing, offset, target.length)) throw new Error(`told to fail at ${offset}`);
    await this.next.read(target, offset);
  }

  readNow(target: Buffer, offset: number): boolean {
    if (touches(this.#holding, offset, target.length) || touches(this.failing, offset, target.length))
      return false;
    return this.now && this.next.readNow(target, offset);
  }

  close(): Promise<void> {
    return this.next.close();
  }
}

let backend: FuseBackend | undefined;
const layers = new Map<number, { readonly device: AttachedDevice; readonly reader: ObedientReader }>();

function layer(layerId: number) {
  const found = layers.get(layerId);
  if (found === undefined) throw new Error(`layer ${layerId} is not attached`);
  return found;
}

async function carryOut(command: ServerCommand): Promise<Omit<ServerAnswer, 'id'>> {
  switch (command.do) {
    case 'serve':
      backend = new FuseBackend(3, command.mountPoint, command).begin();
      return {};
    case 'attach': {
      const { layerId, identifier, path, size, now } = command;
      if (backend === undefined) throw new Error('not serving');
      const reader = new ObedientReader(await FileReader.open({ path, size }), now);
      const device = await backend.attach({ layerId, identifier, reader });
      layers.set(layerId, { device, reader });
      return { device: { path: device.path, size: device.size, reconnected: device.reconnected } };
    }
    case 'fail':
      layer(command.layerId).reader.failing = command.range;
      return {};
    case 'hold':
      layer(command.layerId).reader.hold(command.range);
      return {};
    case 'await-held':
      await layer(command.layerId).reader.untilHeld(command.count);
      return {};
    case 'statistics':
      return { statistics: layer(command.layerId).device.statistics() };
    case 'detach':
      await layer(command.layerId).device.detach();
      return {};
    case 'close':
      await backend?.close();
      return {};
  }
}

process.on('message', ({ id, command }: { id: number; command: ServerCommand }) => {
  carryOut(command).then(
    (answer) => process.send?.({ id, ...answer }),
    (error: unknown) => process.send?.({ id, error: String(error) }),
  );
});
process.on('disconnect', () => process.exit(0));
