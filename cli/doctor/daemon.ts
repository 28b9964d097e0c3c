/**
 * Whether our daemons run, and are of one version.
 */
import type { Configuration } from '../../daemon/configuration.js';
import { VERSION } from '../../daemon/version.js';
import { askDataPlane } from '../node.js';
import { formatDuration } from '../quantities.js';
import { hostStatus, layerStatus } from '../status-report.js';
import { looking, type Finding } from './finding.js';
import { socketState } from './socket-state.js';

/** Milliseconds after which a read that waits is trouble. */
const BLOCKED = 10_000;

export async function lookAtDaemons({ address, root }: Configuration): Promise<readonly Finding[]> {
  const snapshotter = looking('daemon', 'snapshotter');
  const state = await socketState(address);
  const first =
    state === 'answers'
      ? snapshotter.ok(address)
      : snapshotter.wrong(
          `${address}: ${state}`,
          state === 'permission denied'
            ? 'run this as root'
            : 'start erofs-nbd-snapshotter ("systemctl start erofs-nbd-snapshotter"); its log says why when it does not stay',
        );
  return [first, ...(await lookAtDataPlane(root))];
}

async function lookAtDataPlane(root: string): Promise<readonly Finding[]> {
  const plane = looking('daemon', 'data plane');
  try {
    const [hello, list] = await askDataPlane(root, (client) => Promise.all([client.hello(), client.list()]));
    const layers = list.devices.map(layerStatus);
    const oldest = Math.max(0, ...layers.map(({ oldestReadMs }) => oldestReadMs));
    const found = `process ${hello.pid}, version ${hello.version}, ${layers.length} layers attached`;
    return [
      hello.version === VERSION
        ? plane.ok(found)
        : plane.warning(
            `${found}; this command is version ${VERSION}`,
            'the data plane keeps its version until it ends: drain the node, or restart it when nothing is attached',
          ),
      oldest < BLOCKED
        ? looking('daemon', 'reads').ok('none waits for long')
        : looking('daemon', 'reads').wrong(
            `one has been waiting for ${formatDuration(oldest)}`,
            'look at the registries below, and at "erofs-nbd status"',
          ),
      ...list.hosts.map(hostStatus).map((host) => {
        const { ok, warning } = looking('registry', `${host.host}, seen by the data plane`);
        const said = `${host.requests} requests, ${host.failures} failed`;
        return host.healthy
          ? ok(said)
          : warning(
              `${said}, the last: ${host.trouble}`,
              'look at the name, the route and the proxy of the node',
            );
      }),
    ];
  } catch (error) {
    return [
      plane.wrong(
        (error as Error).message,
        'it is started by the snapshotter, and ends with it when nothing is attached',
      ),
    ];
  }
}
