/**
 * The manifests of packaging/kubernetes, compared with what the daemon does: nothing of a cluster is here to say so.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { beforeAll, describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { z } from 'zod';
import { parseConfiguration, type Configuration } from '../../daemon/configuration.js';
import { checkout } from '../debian/packages.js';

// What is not named is refused, so that a key at the wrong place shows.
const metadata = z.strictObject({
  name: z.literal('erofs-nbd'),
  namespace: z.literal('kube-system').optional(),
  labels: z.record(z.string(), z.string()).optional(),
});
const container = z.strictObject({
  name: z.string(),
  image: z.string(),
  command: z.array(z.string()).optional(),
  args: z.array(z.string()).optional(),
  securityContext: z.strictObject({ privileged: z.literal(true) }),
  resources: z.strictObject({ requests: z.strictObject({ cpu: z.string(), memory: z.string() }) }).optional(),
  livenessProbe: z
    .strictObject({
      httpGet: z.strictObject({ host: z.string(), port: z.number(), path: z.literal('/metrics') }),
      initialDelaySeconds: z.number(),
      periodSeconds: z.number(),
      timeoutSeconds: z.number(),
      failureThreshold: z.number(),
    })
    .optional(),
  volumeMounts: z
    .array(
      z.strictObject({
        name: z.string(),
        mountPath: z.string(),
        readOnly: z.literal(true).optional(),
        mountPropagation: z.literal('Bidirectional').optional(),
      }),
    )
    .default([]),
});
const volume = z.union([
  z.strictObject({ name: z.string(), configMap: z.strictObject({ name: z.string() }) }),
  z.strictObject({
    name: z.string(),
    hostPath: z.strictObject({ path: z.string(), type: z.enum(['Directory', 'DirectoryOrCreate']) }),
  }),
  z.strictObject({
    name: z.string(),
    secret: z.strictObject({ secretName: z.string(), optional: z.literal(true) }),
  }),
]);
const daemonSet = z.strictObject({
  apiVersion: z.literal('apps/v1'),
  kind: z.literal('DaemonSet'),
  metadata,
  spec: z.strictObject({
    selector: z.strictObject({ matchLabels: z.record(z.string(), z.string()) }),
    updateStrategy: z.strictObject({ type: z.literal('OnDelete') }),
    template: z.strictObject({
      metadata: z.strictObject({ labels: z.record(z.string(), z.string()) }),
      spec: z.strictObject({
        nodeSelector: z.record(z.string(), z.string()),
        tolerations: z.array(z.strictObject({ operator: z.literal('Exists') })),
        priorityClassName: z.literal('system-node-critical'),
        automountServiceAccountToken: z.literal(false),
        hostNetwork: z.literal(true),
        dnsPolicy: z.literal('ClusterFirstWithHostNet'),
        hostPID: z.literal(true),
        terminationGracePeriodSeconds: z.number(),
        initContainers: z.array(container).length(1),
        containers: z.array(container).length(1),
        volumes: z.array(volume),
      }),
    }),
  }),
});
const configMap = z.strictObject({
  apiVersion: z.literal('v1'),
  kind: z.literal('ConfigMap'),
  metadata,
  data: z.strictObject({ 'config.toml': z.string() }),
});
const runtimeClass = z.strictObject({
  apiVersion: z.literal('node.k8s.io/v1'),
  kind: z.literal('RuntimeClass'),
  metadata,
  handler: z.string(),
  scheduling: z.strictObject({ nodeSelector: z.record(z.string(), z.string()) }),
});

async function manifest<T>(name: string, schema: z.ZodType<T>): Promise<T> {
  const text = await readFile(path.join(checkout, 'packaging', 'kubernetes', name), 'utf8');
  return schema.parse(parse(text));
}

describe('the manifests for Kubernetes', () => {
  let set: z.output<typeof daemonSet>;
  let map: z.output<typeof configMap>;
  let configuration: Configuration;
  let mounts: Map<
    string,
    { readonly volume: z.output<typeof volume>; readonly propagation: string | undefined }
  >;

  beforeAll(async () => {
    set = await manifest('daemonset.yaml', daemonSet);
    map = await manifest('configmap.yaml', configMap);
    configuration = parseConfiguration(map.data['config.toml'], 'configmap.yaml');
    const { containers, volumes } = set.spec.template.spec;
    mounts = new Map(
      (containers[0]?.volumeMounts ?? []).map(({ name, mountPath, mountPropagation }) => {
        const found = volumes.find((one) => one.name === name);
        if (found === undefined) throw new Error(`there is no volume ${name}`);
        return [mountPath, { volume: found, propagation: mountPropagation }];
      }),
    );
    expect(mounts.size).toBe(volumes.length);
  });

  it('mount what the daemon uses, from where the node has it', () => {
    const onTheNode = [...mounts].filter(([, { volume: from }]) => 'hostPath' in from);
    for (const [place, { volume: from }] of onTheNode)
      expect('hostPath' in from && from.hostPath.path).toBe(place);
    expect(onTheNode.map(([place]) => place).sort()).toEqual(
      [
        configuration.root,
        path.dirname(configuration.address),
        path.dirname(configuration.containerd.address),
        path.dirname(configuration.recovery.control_group),
        ...configuration.registry.hosts_dir,
        '/dev',
      ].sort(),
    );
    expect(mounts.has(configuration.registry.kubernetes_secrets)).toBe(true);
  });

  it('have the node see mounts below the root, and no others', () => {
    for (const [place, { propagation }] of mounts)
      expect(propagation).toBe(place === configuration.root ? 'Bidirectional' : undefined);
  });

  it('give the daemon its configuration where it looks for it', () => {
    expect(mounts.get('/etc/erofs-nbd')?.volume).toMatchObject({ configMap: { name: map.metadata.name } });
  });

  it('name options that the daemon has', async () => {
    const args = set.spec.template.spec.containers[0]?.args ?? [];
    const main = path.join(checkout, 'dist', 'snapshotter', 'main.js');
    const { stdout } = await execa(process.execPath, [main, '--help']);
    expect(args).not.toEqual([]);
    for (const argument of args) expect(stdout).toMatch(new RegExp(`^ +${argument}\\b`, 'm'));
  });

  it('look for life where the daemon shows it', () => {
    const { host, port } = set.spec.template.spec.containers[0]?.livenessProbe?.httpGet ?? {};
    expect(configuration.metrics.address).toEqual({ host, port });
  });

  it('fit each other', async () => {
    const { selector, template } = set.spec;
    expect(template.metadata.labels).toMatchObject(selector.matchLabels);
    const [first, second] = [...template.spec.initContainers, ...template.spec.containers];
    expect(first?.image).toBe(second?.image);
    const { version } = JSON.parse(await readFile(path.join(checkout, 'package.json'), 'utf8')) as {
      version: string;
    };
    expect(first?.image.split(':').at(-1)).toBe(version);
    const { scheduling, handler } = await manifest('runtimeclass.yaml', runtimeClass);
    expect(template.spec.nodeSelector).toMatchObject(scheduling.nodeSelector);
    const page = await readFile(path.join(checkout, 'docs', 'clients', 'kubernetes.md'), 'utf8');
    expect(page).toContain(`handler: ${handler}\n`);
    expect(page).toContain(`containerd.runtimes.${handler}]`);
  });
});
