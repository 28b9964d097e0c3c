/**
 * Calls that must be refused, and the code each is refused with, where containerd's suite does not look: made to our
 * snapshotter and to containerd's overlayfs, so that the table below is what containerd does and not what we think.
 */
import { status } from '@grpc/grpc-js';
import { CallError } from '../../proto/unary-call.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';

interface Refusal {
  readonly name: string;
  readonly call: (client: SnapshotsClient) => Promise<unknown>;
  readonly code: status;
  /** What overlayfs answers where it is known to do worse, and why. */
  readonly overlayfs?: { readonly code: status; readonly why: string };
}

const { ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, OK, UNKNOWN } = status;

/** Present in both snapshotters while the calls are made. */
async function makeSnapshots(client: SnapshotsClient): Promise<void> {
  await client.prepare('base key');
  await client.commit('base', 'base key');
  await client.prepare('child key', 'base');
  await client.commit('child', 'child key', { 'containerd.io/gc.root': 'x', 'a.b': 'c' });
  await client.prepare('active', 'base');
  await client.prepare('bare');
  await client.view('view', 'child');
}

const BOLT = 'the store refuses the empty key, and its error has no code';

const REFUSALS: readonly Refusal[] = [
  ...(['prepare', 'view'] as const).flatMap((method): Refusal[] => [
    { name: `${method} on an unknown parent`, call: (c) => c[method]('new', 'nowhere'), code: NOT_FOUND },
    {
      name: `${method} on an active parent`,
      call: (c) => c[method]('new', 'active'),
      code: INVALID_ARGUMENT,
    },
    { name: `${method} on a view`, call: (c) => c[method]('new', 'view'), code: INVALID_ARGUMENT },
    { name: `${method} of an active key`, call: (c) => c[method]('active', 'base'), code: ALREADY_EXISTS },
    { name: `${method} of a view's key`, call: (c) => c[method]('view', 'base'), code: ALREADY_EXISTS },
    { name: `${method} of a committed name`, call: (c) => c[method]('child'), code: ALREADY_EXISTS },
    {
      name: `${method} under its parent's name`,
      call: (c) => c[method]('base', 'base'),
      code: ALREADY_EXISTS,
    },
    {
      name: `${method} of a key in use on an unknown parent`,
      call: (c) => c[method]('active', 'nowhere'),
      code: NOT_FOUND,
    },
    {
      name: `${method} of a key in use on an active parent`,
      call: (c) => c[method]('view', 'active'),
      code: INVALID_ARGUMENT,
    },
    {
      name: `${method} of the empty key`,
      call: (c) => c[method](''),
      code: INVALID_ARGUMENT,
      overlayfs: { code: UNKNOWN, why: BOLT },
    },
  ]),
  { name: 'commit of an unknown key', call: (c) => c.commit('new', 'nowhere'), code: NOT_FOUND },
  { name: 'commit of a view', call: (c) => c.commit('new', 'view'), code: FAILED_PRECONDITION },
  { name: 'commit of a committed', call: (c) => c.commit('new', 'base'), code: FAILED_PRECONDITION },
  { name: 'commit a second time', call: (c) => c.commit('again', 'child key'), code: NOT_FOUND },
  { name: 'commit under a taken name', call: (c) => c.commit('base', 'active'), code: ALREADY_EXISTS },
  { name: 'commit under its own key', call: (c) => c.commit('active', 'active'), code: ALREADY_EXISTS },
  { name: "commit under a view's key", call: (c) => c.commit('view', 'active'), code: ALREADY_EXISTS },
  {
    name: 'commit of a view under a taken name',
    call: (c) => c.commit('base', 'view'),
    code: ALREADY_EXISTS,
  },
  { name: 'both commit arguments wrong', call: (c) => c.commit('base', 'nowhere'), code: NOT_FOUND },
  {
    name: 'commit under the empty name',
    call: (c) => c.commit('', 'active'),
    code: INVALID_ARGUMENT,
    overlayfs: { code: UNKNOWN, why: BOLT },
  },
  { name: 'remove of an unknown key', call: (c) => c.remove('nowhere'), code: NOT_FOUND },
  { name: 'remove of the empty key', call: (c) => c.remove(''), code: NOT_FOUND },
  { name: 'remove of the parent of many', call: (c) => c.remove('base'), code: FAILED_PRECONDITION },
  { name: "remove of a view's parent", call: (c) => c.remove('child'), code: FAILED_PRECONDITION },
  { name: 'stat of an unknown key', call: (c) => c.stat('nowhere'), code: NOT_FOUND },
  { name: 'stat of a key that was committed', call: (c) => c.stat('base key'), code: NOT_FOUND },
  { name: 'stat of the empty key', call: (c) => c.stat(''), code: NOT_FOUND },
  { name: 'mounts of an unknown key', call: (c) => c.mounts('nowhere'), code: NOT_FOUND },
  { name: 'mounts of a committed', call: (c) => c.mounts('base'), code: FAILED_PRECONDITION },
  { name: 'usage of an unknown key', call: (c) => c.usage('nowhere'), code: NOT_FOUND },
  {
    name: 'update of the empty key',
    call: (c) => c.update({ name: '' }, ['labels']),
    code: NOT_FOUND,
  },
  { name: 'mounts of the empty key', call: (c) => c.mounts(''), code: NOT_FOUND },
  { name: 'usage of the empty key', call: (c) => c.usage(''), code: NOT_FOUND },
  { name: 'commit of the empty key', call: (c) => c.commit('new', ''), code: NOT_FOUND },
  {
    name: 'update of an unknown key',
    call: (c) => c.update({ name: 'nowhere' }, ['labels']),
    code: NOT_FOUND,
  },
  ...['parent', 'kind', 'name', 'created_at', 'Labels', 'labelsx', ''].map((field): Refusal => ({
    name: `update of the field ${JSON.stringify(field)}`,
    call: (c) => c.update({ name: 'child', parent: 'active', labels: { x: 'y' } }, [field]),
    code: INVALID_ARGUMENT,
  })),
  ...['parent', 'kind'].map((field): Refusal => ({
    name: `update of the field ${field} of an unknown key`,
    call: (c) => c.update({ name: 'nowhere' }, [field]),
    code: NOT_FOUND,
  })),
  {
    name: 'update of labels together with another field',
    call: (c) => c.update({ name: 'child', labels: { x: 'y' } }, ['labels', 'parent']),
    code: INVALID_ARGUMENT,
  },
  ...['name=base', 'name==', '==base', 'name=="base', 'labels."a=="c"', 'name==base,', 'a b'].map(
    (filter): Refusal => ({
      name: `list with the filter ${filter}`,
      call: (c) => c.list(filter),
      code: INVALID_ARGUMENT,
      overlayfs: { code: UNKNOWN, why: 'errors of List are not given codes' },
    }),
  ),
  {
    name: 'list with a bad regular expression',
    call: (c) => c.list('name~=('),
    code: INVALID_ARGUMENT,
    overlayfs: { code: OK, why: 'it matches nothing' },
  },
];

export interface RefusalResult {
  readonly name: string;
  /** Codes by name, or `OK` for a call that was answered. */
  readonly ours: string;
  readonly overlayfs: string;
  /** What is wrong; undefined when all is as the table says. */
  readonly trouble: string | undefined;
  /** Why overlayfs answers otherwise, where that is known. */
  readonly why: string | undefined;
}

/** @returns `OK` for a call that was answered */
export async function codeOf(call: Promise<unknown>): Promise<status> {
  try {
    await call;
    return status.OK;
  } catch (error) {
    if (error instanceof CallError) return error.code;
    // Streams reject with what grpc-js makes.
    if (error instanceof Error && 'code' in error && typeof error.code === 'number') return error.code;
    throw error;
  }
}

/** What a snapshotter holds, without the times at which it came to. */
export async function contents(client: SnapshotsClient): Promise<string> {
  const infos = await client.list();
  const facts = infos.map(({ name, parent, kind, labels }) => [name, parent, kind, labels]);
  return JSON.stringify(facts.sort());
}

/**
 * Makes every call to both and compares; each snapshotter must hold afterwards exactly what it held before.
 *
 * @param sockets of snapshotters that hold nothing, and hold nothing again at the end
 */
export async function compareRefusals(sockets: {
  readonly ours: string;
  readonly overlayfs: string;
}): Promise<RefusalResult[]> {
  const ours = new SnapshotsClient(sockets.ours);
  const overlayfs = new SnapshotsClient(sockets.overlayfs);
  const results: RefusalResult[] = [];
  try {
    await makeSnapshots(ours);
    await makeSnapshots(overlayfs);
    const before = await contents(ours);
    for (const refusal of REFUSALS) {
      const answers = {
        ours: await codeOf(refusal.call(ours)),
        overlayfs: await codeOf(refusal.call(overlayfs)),
      };
      const expected = refusal.overlayfs?.code ?? refusal.code;
      let trouble: string | undefined;
      if (answers.ours !== refusal.code) trouble = `ours should answer ${status[refusal.code]}`;
      else if (answers.overlayfs !== expected) trouble = `overlayfs was to answer ${status[expected]}`;
      else if ((await contents(ours)) !== before) trouble = 'ours holds something else afterwards';
      results.push({
        name: refusal.name,
        ours: status[answers.ours],
        overlayfs: status[answers.overlayfs],
        trouble,
        why: refusal.overlayfs?.why,
      });
    }
    for (const key of ['view', 'bare', 'active', 'child', 'base']) {
      const answers = {
        ours: await codeOf(ours.remove(key)),
        overlayfs: await codeOf(overlayfs.remove(key)),
      };
      if (answers.ours === OK && answers.overlayfs === OK) continue;
      results.push({
        name: `remove of ${key} in the end`,
        ours: status[answers.ours],
        overlayfs: status[answers.overlayfs],
        trouble: 'both should remove it',
        why: undefined,
      });
    }
  } finally {
    ours.close();
    overlayfs.close();
  }
  return results;
}
