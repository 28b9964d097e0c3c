/**
 * A node of its own, run in a network namespace by two-nodes.test.ts: containerd and our snapshotter, which pull and run
 * an image whose registry cannot be reached from here, with what a hosts.toml names instead.
 *
 *     node dist/test/faults/second-node.js REFERENCE HOSTS_DIRECTORY
 *
 * The last line is JSON: what the container printed, and whether the registry could be reached after all.
 */
import { Stack } from '../stack/stack.js';

const [reference = '', hosts = ''] = process.argv.slice(2);
const stack = await Stack.create();
try {
  const registry = reference.slice(0, reference.indexOf('/'));
  const reachable = await fetch(`http://${registry}/v2/`).then(
    () => true,
    () => false,
  );
  const snapshotter = await stack.startSnapshotter({
    configuration: `version = 1\n[registry]\nhosts_dir = ${JSON.stringify(hosts)}\n`,
  });
  const containerd = await stack.startContainerd({ snapshotters: [stack.plugin()] });
  await containerd.ctr('image', 'pull', '--hosts-dir', hosts, '--snapshotter', 'erofs-nbd', reference);
  const devices = (await snapshotter.devices())?.length ?? 0;
  const command = ['cat', '/etc/motd'];
  const { stdout } = await containerd.ctr(
    'run',
    '--rm',
    '--snapshotter',
    'erofs-nbd',
    reference,
    'second',
    ...command,
  );
  console.log(JSON.stringify({ reachable, devices, output: String(stdout) }));
} finally {
  for (const trouble of await stack.remove()) console.error(trouble);
}
