import { readdirSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { createLogger } from '../daemon/log.js';
import { rehearseDevice, rehearseExchange, rehearseTrust, rehearseUntil } from './rehearsal.js';

const log = createLogger('blobserve', 'error');
const never = new Promise<never>(() => undefined);
const descriptors = (): number => readdirSync('/proc/self/fd').length;

describe('a process that stands by', () => {
  test('rehearses an exchange, a device and its trust, and keeps no descriptor of it', async () => {
    // What is loaded for the first time may open something for good.
    await rehearseExchange();
    await rehearseDevice();
    await rehearseTrust();
    const before = descriptors();
    await rehearseUntil(never, [rehearseExchange, rehearseDevice, rehearseTrust], log);
    expect(descriptors()).toBe(before);
  });

  test('rehearses nothing when it is to serve at once', async () => {
    let rehearsed = false;
    const part = (): Promise<void> => {
      rehearsed = true;
      return never;
    };
    await rehearseUntil(Promise.resolve(true), [part], log);
    expect(rehearsed).toBe(false);
  });

  test('does not keep readers waiting for the end of its rehearsal', async () => {
    let tell: (told: boolean) => void = () => undefined;
    const told = new Promise<boolean>((resolve) => (tell = resolve));
    const part = (): Promise<void> => {
      tell(true);
      return never;
    };
    await rehearseUntil(told, [part], log);
  });

  test('serves all the same when a rehearsal fails', async () => {
    await rehearseUntil(never, [() => Promise.reject(new Error('on purpose'))], log);
  });
});
