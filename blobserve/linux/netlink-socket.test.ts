import { describe, expect, it } from 'vitest';
import { GENL_ID_CTRL } from './netlink.js';
import { GenericNetlinkSocket, NetlinkError } from './netlink-socket.js';

describe('a generic netlink socket', () => {
  it('finds families that the kernel has, and tells those it has not', async () => {
    const socket = GenericNetlinkSocket.open();
    try {
      expect(await socket.family('nlctrl')).toBe(GENL_ID_CTRL);
      expect(await socket.family('no-such-family')).toBeUndefined();
      expect(await Promise.all([1, 2, 3, 4, 5, 6].map(() => socket.family('nlctrl')))).toEqual(
        Array(6).fill(16),
      );
    } finally {
      await socket.close();
    }
  });

  it('reports what the kernel refuses with its name', async () => {
    const socket = GenericNetlinkSocket.open();
    try {
      const request = socket.request(
        { family: GENL_ID_CTRL, command: 99, version: 1, attributes: [] },
        'ask nonsense',
      );
      await expect(request).rejects.toThrow(NetlinkError);
      await expect(request).rejects.toThrow(/^ask nonsense: E(OP)?NOTSUPP?$/);
    } finally {
      await socket.close();
    }
  });

  it('does nothing once it is closed', async () => {
    const socket = GenericNetlinkSocket.open();
    await socket.close();
    await socket.close();
    await expect(socket.family('nlctrl')).rejects.toThrow('the netlink socket is closed');
  });
});
