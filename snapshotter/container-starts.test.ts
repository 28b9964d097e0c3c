import { status } from '@grpc/grpc-js';
import { describe, expect, it } from 'vitest';
import { silentLogger } from '../daemon/log.js';
import { containers, type control } from '../proto/messages.js';
import { CallError } from '../proto/unary-call.js';
import type { BlobServeClient } from './blobserve-client.js';
import { ContainerStarts } from './container-starts.js';

/** What the data plane is told, when containerd answers so. */
async function told(
  key: string,
  answer: (id: string) => containers.Container.$Properties | Promise<never>,
  layers: readonly string[] = ['sha256:top', 'sha256:base'],
): Promise<control.StartedRequest.$Properties[]> {
  const said: control.StartedRequest.$Properties[] = [];
  const client = {
    started: (request: control.StartedRequest.$Properties) => Promise.resolve(void said.push(request)),
  } as unknown as BlobServeClient;
  let asked: string | undefined;
  const starts = new ContainerStarts({
    dataPlane: () => Promise.resolve({ backend: 'fuse', call: (work) => work(client) }),
    containerd: {
      call: ((context: { namespace: string }, _method: unknown, { id }: { id: string }) => {
        asked = `${context.namespace} ${id}`;
        return Promise.resolve()
          .then(() => answer(id))
          .then((container) => ({ container }));
      }) as never,
    },
    timeoutMs: 1000,
    log: silentLogger,
  });
  starts.noticed(key, () => layers);
  expect(said).toEqual([]);
  for (let turn = 0; turn < 5; turn++) await new Promise(setImmediate);
  if (asked !== undefined) expect(asked).toBe('k8s.io a/b');
  return said;
}

const spec = (args: unknown): containers.Any.$Properties => ({
  value: Buffer.from(JSON.stringify({ process: { args, env: ['PATH=/bin'] } })),
});

describe('the start of a container', () => {
  const layerDigests = ['sha256:top', 'sha256:base'];

  it('is told at once, and again when its command is known, which is not told itself', async () => {
    const said = await told('k8s.io/7/a/b', (id) => ({ id, snapshotKey: id, spec: spec(['sh', 'secret']) }));
    expect(said).toMatchObject([
      { key: 'k8s.io/7/a/b', layerDigests, command: '' },
      { key: 'k8s.io/7/a/b', layerDigests },
    ]);
    expect(said[1]?.command).toMatch(/^sha256:[0-9a-f]{64}$/);
    const other = await told('k8s.io/7/a/b', (id) => ({ id, snapshotKey: id, spec: spec(['sh', 'other']) }));
    expect(other[1]?.command).not.toBe(said[1]?.command);
  });

  it.each([
    ['containerd does not know it', () => Promise.reject(new CallError('no', status.NOT_FOUND))],
    ['it is of another snapshot', () => ({ id: 'a/b', snapshotKey: 'c', spec: spec(['sh']) })],
    ['it has no command', () => ({ id: 'a/b', snapshotKey: 'a/b', spec: spec('sh') })],
  ])('is told without a command when %s', async (_why, answer) => {
    expect(await told('k8s.io/7/a/b', answer)).toHaveLength(1);
    expect(await told('by hand', answer)).toHaveLength(1);
  });

  it('is not told when nothing of it is served here', async () => {
    expect(await told('k8s.io/7/a/b', () => ({}), [])).toEqual([]);
  });
});
