/**
 * A process that keeps one nbd device connected by waiting in ioctl NBD_DO_IT until its socket is dead.
 *
 *     node nbd-ioctl-child.js /dev/nbdN SIZE     with the kernel's end of the socket as descriptor 3
 *
 * Ends with status 16 when the device is taken. Numbers: linux/nbd.h, linux/fs.h.
 */
import { openSync } from 'node:fs';
import koffi from 'koffi';
import { libc, systemCallError } from '../linux/libc.js';
import { NBD_BLOCK_SIZE, NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY } from './nbd-netlink.js';

const NBD_SET_SOCK = 0xab00;
const NBD_SET_BLKSIZE = 0xab01;
const NBD_DO_IT = 0xab03;
const NBD_CLEAR_SOCK = 0xab04;
const NBD_SET_SIZE_BLOCKS = 0xab07;
const NBD_SET_FLAGS = 0xab0a;

const SOCKET = 3;
const EXIT_BUSY = 16;

const ioctlCall = libc.func('int ioctl(int descriptor, ulong request, ulong argument)') as (
  descriptor: number,
  request: number,
  argument: number,
) => number;

function ioctl(descriptor: number, name: string, request: number, argument: number, device: string): void {
  if (ioctlCall(descriptor, request, argument) !== 0) {
    const errno = koffi.errno();
    if (errno === koffi.os.errno['EBUSY']) {
      process.exit(EXIT_BUSY);
    }
    throw systemCallError(`ioctl ${name}`, device, errno);
  }
}

const [, , device = '', size = ''] = process.argv;
const blocks = Number(size) / NBD_BLOCK_SIZE;
if (!Number.isSafeInteger(blocks) || blocks <= 0) {
  throw new RangeError(`${device}: ${size} bytes are not a multiple of ${NBD_BLOCK_SIZE}`);
}
const descriptor = openSync(device, 'r+');
// The socket first: it fails on a device that is taken, before anything of it is changed.
ioctl(descriptor, 'NBD_SET_SOCK', NBD_SET_SOCK, SOCKET, device);
ioctl(descriptor, 'NBD_SET_BLKSIZE', NBD_SET_BLKSIZE, NBD_BLOCK_SIZE, device);
ioctl(descriptor, 'NBD_SET_SIZE_BLOCKS', NBD_SET_SIZE_BLOCKS, blocks, device);
ioctl(descriptor, 'NBD_SET_FLAGS', NBD_SET_FLAGS, NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY, device);
// Waits for as long as the socket lives; how it ends is not this process's business.
ioctlCall(descriptor, NBD_DO_IT, 0);
ioctlCall(descriptor, NBD_CLEAR_SOCK, 0);
