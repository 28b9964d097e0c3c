/**
 * systemd's end of the protocol by which services tell it how they are and have it hold descriptors: a stand-in for where
 * no systemd runs. Protocol: sd_notify(3), sd_pid_notify_with_fds(3).
 */
import { closeSync } from 'node:fs';
import koffi from 'koffi';
import { unixAddress } from '../../blobserve/linux/datagram.js';

const libc = koffi.load('libc.so.6');
const Vector = koffi.struct({ bytes: 'void *', length: 'size_t' });
const Header = koffi.struct({
  address: 'void *',
  addressSize: 'uint32_t',
  vectors: koffi.pointer(Vector),
  vectorCount: 'size_t',
  control: 'void *',
  controlLength: 'size_t',
  flags: 'int',
});
const socketCall = libc.func('int socket(int domain, int type, int protocol)');
const bindCall = libc.func('int bind(int fd, const void *address, uint32_t size)');
const recvmsgCall = libc.func('recvmsg', 'long', ['int', koffi.inout(koffi.pointer(Header)), 'int']);

const AF_UNIX = 1;
const SOCK_DGRAM_CLOEXEC = 2 | 0o2000000;
const MSG_DONTWAIT = 0x40;
const MSG_CMSG_CLOEXEC = 0x40000000;

export class StandInServiceManager {
  readonly #socket: number;
  readonly #stored = new Map<string, number>();
  /** Every message so far, as it came. */
  readonly messages: string[] = [];

  /** @param address path, or `@name`, of the socket that services are told of in NOTIFY_SOCKET */
  constructor(readonly address: string) {
    this.#socket = socketCall(AF_UNIX, SOCK_DGRAM_CLOEXEC, 0) as number;
    const bytes = unixAddress(address);
    if (bindCall(this.#socket, bytes, bytes.length) !== 0) throw new Error(`${address}: cannot be bound`);
  }

  /** Takes what has come so far, without waiting. */
  receive(): void {
    for (;;) {
      const [bytes, control] = [Buffer.alloc(4096), Buffer.alloc(24)];
      const message = {
        ...{ address: null, addressSize: 0, vectors: [{ bytes, length: bytes.length }], vectorCount: 1 },
        ...{ control, controlLength: control.length, flags: 0 },
      };
      const length = Number(recvmsgCall(this.#socket, message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC));
      if (length < 0) return;
      const descriptor = control.readBigUInt64LE(0) > 0n ? control.readInt32LE(16) : undefined;
      this.#take(bytes.toString('utf8', 0, length), descriptor);
    }
  }

  /** What it would hand to the service's next process. */
  get stored(): { name: string; descriptor: number }[] {
    this.receive();
    return [...this.#stored].map(([name, descriptor]) => ({ name, descriptor }));
  }

  close(): void {
    this.receive();
    for (const descriptor of this.#stored.values()) closeSync(descriptor);
    closeSync(this.#socket);
  }

  #take(text: string, descriptor: number | undefined): void {
    this.messages.push(text);
    const said = new Map(text.split('\n').map((line) => line.split('=', 2) as [string, string]));
    const name = said.get('FDNAME') ?? 'stored';
    const before = this.#stored.get(name);
    if (said.get('FDSTOREREMOVE') === '1' && before !== undefined) {
      closeSync(before);
      this.#stored.delete(name);
    }
    if (descriptor === undefined) return;
    if (said.get('FDSTORE') === '1') this.#stored.set(name, descriptor);
    else closeSync(descriptor);
  }
}
