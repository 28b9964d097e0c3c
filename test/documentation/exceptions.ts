/**
 * The commands of the documentation that cannot be run in a clean root of this machine, and why: all of them, in one place. A
 * command that is neither run nor named here fails the test, and so does a name here that no page has.
 */

export interface Exception {
  readonly why: string;
  /** Run in its place, so that what follows finds what it has made. */
  readonly instead?: string;
}

const OWN_STEP = 'CI runs it as a step of its own (.ci/run)';
const NO_DOCKER = 'needs a Docker whose containerd is this one: test/clients/docker.test.ts runs it';
const NO_MKFS =
  'Debian 12’s mkfs.erofs reads no tars: test/system/convert.test.ts and test/command/convert.test.ts convert';
const NO_CLUSTER = 'there is no cluster';
const NO_NERDCTL = 'Debian has no nerdctl; test/clients makes its calls with containerd’s Go library';

export const EXCEPTIONS: Readonly<Record<string, Exception>> = {
  'npm ci': { why: OWN_STEP },
  'npm test': { why: OWN_STEP },
  'npm run build': { why: OWN_STEP },
  'npm run demo': { why: OWN_STEP },
  'docker pull registry.example.com/app:1': { why: NO_DOCKER },
  'docker run --rm registry.example.com/app:1': { why: NO_DOCKER },
  'nerdctl --snapshotter erofs-nbd pull registry.example.com/app:1': { why: NO_NERDCTL },
  'nerdctl --snapshotter erofs-nbd run --rm registry.example.com/app:1': { why: NO_NERDCTL },
  "kubectl get secret pull -o jsonpath='{.data.\\.dockerconfigjson}' | base64 -d > /etc/erofs-nbd/secrets/pull":
    { why: NO_CLUSTER },
  'kubectl label node NODE erofs-nbd.example.com/enabled=true': { why: NO_CLUSTER },
  'kubectl apply -f packaging/kubernetes/configmap.yaml -f packaging/kubernetes/daemonset.yaml': {
    why: NO_CLUSTER,
  },
  'erofs-nbd convert registry.example.com/app:1 registry.example.com/app:1-erofs': { why: NO_MKFS },
  'erofs-nbd convert --platform linux/amd64 --platform linux/arm64 registry.example.com/app:1 oci:/srv/app:1':
    { why: NO_MKFS },
  'erofs-nbd convert --keep-original oci:/srv/app:1 registry.example.com/app:both': { why: NO_MKFS },
  'erofs-nbd convert --compress zstd,level=9 registry.example.com/app:1 registry.example.com/app:1-zstd -- -C16384 -Efragments':
    { why: NO_MKFS },
  'systemctl disable --now erofs-nbd-snapshotter': {
    why: 'there is no systemd: npm run test:systemd has one',
    instead: 'end_daemon',
  },
  'erofs-nbd mount -o oci.blob=sha256:…,oci.tarindex=i.erofs,oci.zinfo=i.zinfo registry.example.com/app:1 /mnt':
    {
      why: 'the digest is left out: test/system/by-hand.test.ts mounts every combination',
    },
};

/** Commands that stay in the foreground: they are left running, until the next one of them or the end. */
export const DAEMONS: ReadonlySet<string> = new Set([
  'node dist/snapshotter/main.js',
  'erofs-nbd-snapshotter --config /etc/erofs-nbd/config.toml --root /var/lib/erofs-nbd --address /run/erofs-nbd/snapshotter.sock',
]);
