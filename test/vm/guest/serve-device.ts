/**
 * A process that serves one nbd device, for the test VM: says what happens on stdout, does what stdin says.
 *
 *     node serve-device.js IDENTIFIER SIZE MODE
 *
 * The blob's 8-byte words hold their own offset xor a constant. MODE `memory` answers at once, `slow` after 20 ms
 * and with an error for the block at 1 MiB, `stuck` never beyond 1 MiB. Lines on stdin: `detach`, `statistics`,
 * `break` (the connection to the kernel).
 */
import { readdirSync, readlinkSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { NbdBackend } from '../../../blobserve/attach/nbd-backend.js';
import { libc } from '../../../blobserve/linux/libc.js';
import { type BlobReader, ReadError } from '../../../blobserve/readers/blob-reader.js';
import { silentLogger } from '../../../daemon/log.js';
import { fillPattern } from './pattern.js';

const BAD_OFFSET = 1024 * 1024;
const BAD_LENGTH = 4096;

const shutdown = libc.func('int shutdown(int descriptor, int how)') as (
  descriptor: number,
  how: number,
) => number;

/** Ends every stream of this process but the standard ones: that is the device's. */
function breakConnection(): void {
  for (const name of readdirSync('/proc/self/fd')) {
    const descriptor = Number(name);
    if (descriptor > 2 && isSocket(descriptor)) {
      shutdown(descriptor, 2);
    }
  }
}

function isSocket(descriptor: number): boolean {
  try {
    return readlinkSync(`/proc/self/fd/${descriptor}`).startsWith('socket:');
  } catch {
    // The descriptor that listed the directory is closed by now.
    return false;
  }
}

const [, , identifier = '', sizeText = '', mode = 'memory'] = process.argv;

const reader: BlobReader = {
  size: Number(sizeText),
  async read(target, offset) {
    if (mode === 'stuck') {
      process.stdout.write(`stuck ${offset} ${target.length}\n`);
      await new Promise(() => undefined);
    }
    if (mode === 'slow') {
      await sleep(20);
    }
    if (offset < BAD_OFFSET + BAD_LENGTH && offset + target.length > BAD_OFFSET) {
      throw new ReadError('transient', `no bytes at ${BAD_OFFSET}`);
    }
    fillPattern(target, offset);
  },
  readNow(target, offset) {
    // The kernel looks for partitions at the beginning: a device that is stuck there cannot even be opened.
    if (mode === 'slow' || (mode === 'stuck' && offset >= BAD_OFFSET)) {
      return false;
    }
    fillPattern(target, offset);
    return true;
  },
  close: () => Promise.resolve(),
};

const backend = await NbdBackend.open({ log: silentLogger });
const device = await backend.attach({ layerId: 1, identifier, reader });
process.stdout.write(`attached ${device.path} ${device.reconnected ? 'reconnected' : 'new'}\n`);

for await (const line of createInterface({ input: process.stdin })) {
  if (line === 'detach') {
    await device.detach();
    process.stdout.write('detached\n');
  } else if (line === 'break') {
    breakConnection();
    process.stdout.write('broken\n');
  } else if (line === 'statistics') {
    process.stdout.write(`${JSON.stringify(device.statistics())}\n`);
  }
}
await backend.close();
