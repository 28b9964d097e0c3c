import { closeSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import koffi from 'koffi';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { unixAddress } from '../blobserve/linux/datagram.js';
import { silentLogger } from '../daemon/log.js';
import { ServiceManager } from './service-manager.js';

/** systemd's end of it. */
class Receiver {
  static readonly #libc = koffi.load('libc.so.6');
  static readonly #socket = Receiver.#libc.func('int socket(int domain, int type, int protocol)');
  static readonly #bind = Receiver.#libc.func('int bind(int fd, const void *address, uint32_t size)');
  static readonly #recv = Receiver.#libc.func('long recv(int fd, void *bytes, ulong length, int flags)');
  readonly descriptor: number;

  constructor(name: string) {
    this.descriptor = Receiver.#socket(1, 2, 0) as number;
    const address = unixAddress(name);
    expect(Receiver.#bind(this.descriptor, address, address.length)).toBe(0);
  }

  /** What has come so far, without waiting. */
  received(): string[] {
    const messages: string[] = [];
    for (const bytes = Buffer.alloc(1000); ;) {
      const length = Number(Receiver.#recv(this.descriptor, bytes, bytes.length, 0x40));
      if (length < 0) return messages;
      messages.push(bytes.toString('utf8', 0, length));
    }
  }

  close(): void {
    closeSync(this.descriptor);
  }
}

describe('what systemd is told', () => {
  let directory: string;
  let receiver: Receiver | undefined;
  beforeEach(() => {
    directory = mkdtempSync(path.join(tmpdir(), 'notify-'));
  });
  afterEach(() => {
    receiver?.close();
    receiver = undefined;
    rmSync(directory, { recursive: true });
  });

  it.each(['a path', 'an abstract name'])('goes to the socket it named, by %s', (kind) => {
    const name = kind === 'a path' ? path.join(directory, 'notify') : `@erofs-nbd-${process.pid}`;
    receiver = new Receiver(name);
    const environment: NodeJS.ProcessEnv = { NOTIFY_SOCKET: name, OTHER: 'stays' };
    const manager = new ServiceManager(environment, silentLogger);
    expect(environment).toEqual({ OTHER: 'stays' });
    manager.ready('serving');
    manager.stopping();
    expect(receiver.received()).toEqual(['READY=1\nSTATUS=serving', 'STOPPING=1']);
  });

  it('comes again and again where there is a watchdog, and only to who is meant', async () => {
    const name = path.join(directory, 'notify');
    receiver = new Receiver(name);
    const watchdog = { NOTIFY_SOCKET: name, WATCHDOG_USEC: '40000' };
    new ServiceManager({ ...watchdog, WATCHDOG_PID: '1' }, silentLogger).ready('another');
    const pid = String(process.pid);
    new ServiceManager({ ...watchdog, WATCHDOG_PID: pid }, silentLogger).ready('this one');
    const messages: string[] = [];
    await expect
      .poll(() => {
        messages.push(...(receiver?.received() ?? []));
        return messages.filter((message) => message === 'WATCHDOG=1').length;
      })
      .toBeGreaterThan(2);
    expect(messages.slice(0, 2)).toEqual(['READY=1\nSTATUS=another', 'READY=1\nSTATUS=this one']);
  });

  it('is nothing without systemd, and no trouble when it is gone', () => {
    new ServiceManager({}, silentLogger).ready('serving');
    new ServiceManager({ NOTIFY_SOCKET: path.join(directory, 'absent') }, silentLogger).ready('serving');
  });
});
