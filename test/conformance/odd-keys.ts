/**
 * Keys and names that are no file names, through the whole life of a snapshot: every call of it is answered as containerd's
 * overlayfs answers it, and none of them leads to another snapshot or out of the root directory.
 */
import { status } from '@grpc/grpc-js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import { codeOf, contents, type RefusalResult } from './error-codes.js';

const KEYS: Readonly<Record<string, string>> = {
  slashes: '/a/b//c/',
  'one slash': '/',
  dots: '.',
  'the parent directory': '..',
  'a way out': '../../../../tmp/erofs-nbd-escaped',
  'an absolute path': '/etc/passwd',
  'a NUL': '\0',
  'a NUL within': 'a\0b',
  spaces: '  a b\t\n ',
  'another alphabet': 'ключ/鍵/🔑',
  quotes: `'"; DROP TABLE snapshots; --`,
  'a pattern': '%_*?[a]',
  'a number, as directories have': '1',
  'one namespace': 'default/1/base',
  'another namespace': 'other/1/base',
  '4,096 characters': 'k'.repeat(4096),
  '60,000 characters': 'k'.repeat(60_000),
};

/** What is done with a key, in this order; every call gets what the ones before have left. */
const LIFE: readonly (readonly [string, (client: SnapshotsClient, key: string) => Promise<unknown>])[] = [
  ['prepare', (c, key) => c.prepare(key)],
  ['prepare again', (c, key) => c.prepare(key)],
  ['stat', (c, key) => c.stat(key)],
  ['mounts', (c, key) => c.mounts(key)],
  ['usage', (c, key) => c.usage(key)],
  ['update', (c, key) => c.update({ name: key, labels: { 'containerd.io/gc.root': 'x' } }, ['labels'])],
  ['stat of its beginning', (c, key) => c.stat([...key].slice(0, -1).join(''))],
  ['stat of more', (c, key) => c.stat(`${key}/`)],
  ['commit under a name like it', (c, key) => c.commit(`${key}${key}`, key)],
  ['prepare on it, under its first key', (c, key) => c.prepare(key, `${key}${key}`)],
  ['mounts on it', (c, key) => c.mounts(key)],
  ['remove the parent', (c, key) => c.remove(`${key}${key}`)],
  ['remove', (c, key) => c.remove(key)],
  ['remove again', (c, key) => c.remove(key)],
  ['view', (c, key) => c.view(key, `${key}${key}`)],
  ['remove the view', (c, key) => c.remove(key)],
  ['remove the parent in the end', (c, key) => c.remove(`${key}${key}`)],
];

/** @param sockets of snapshotters that hold nothing, and hold nothing again at the end */
export async function compareOddKeys(sockets: {
  readonly ours: string;
  readonly overlayfs: string;
}): Promise<RefusalResult[]> {
  const ours = new SnapshotsClient(sockets.ours);
  const overlayfs = new SnapshotsClient(sockets.overlayfs);
  const results: RefusalResult[] = [];
  try {
    for (const [name, key] of Object.entries(KEYS)) {
      const answers: string[] = [];
      const differences: string[] = [];
      for (const [step, call] of LIFE) {
        const mine = status[await codeOf(call(ours, key))];
        const theirs = status[await codeOf(call(overlayfs, key))];
        answers.push(theirs);
        if (mine !== theirs) differences.push(`${step}: ${mine}, overlayfs ${theirs}`);
      }
      const left = await contents(ours);
      if (left !== '[]') differences.push(`left behind: ${left.slice(0, 200)}`);
      results.push({
        name: `the life of a snapshot, key with ${name}`,
        ours: differences.length === 0 ? 'the same' : 'differs',
        overlayfs: `${answers.filter((code) => code === 'OK').length} of ${LIFE.length} calls answered`,
        trouble: differences.length === 0 ? undefined : differences.join('; '),
        why: undefined,
      });
    }
  } finally {
    ours.close();
    overlayfs.close();
  }
  return results;
}
