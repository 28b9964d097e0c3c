/**
 * `erofs-nbd doctor`: what on this node keeps layers from being served, and what to do about it. Changes nothing, but that
 * the kernel may load its nbd module when it is asked for it.
 */
import process from 'node:process';
import type { Command } from 'commander';
import type { Configuration } from '../daemon/configuration.js';
import { lookAtContainerd } from './doctor/containerd.js';
import { lookAtDaemons } from './doctor/daemon.js';
import { lookAtDisk } from './doctor/disk.js';
import { guarded, type Finding } from './doctor/finding.js';
import { lookAtKernel, lookAtRights } from './doctor/kernel.js';
import { lookAtRegistries } from './doctor/registry.js';
import { EXIT } from './failure.js';
import { nodeConfiguration, withNodeOptions, type NodeOptions } from './node.js';
import { printable } from './quantities.js';
import { print, printJson } from './terminal.js';

interface DoctorOptions extends NodeOptions {
  readonly containerdConfig: string;
  readonly json?: true;
}

export function addDoctorCommand(program: Command): void {
  withNodeOptions(program.command('doctor'))
    .description('look for what keeps layers from being served lazily, and say what to do')
    .argument('[image-or-host...]', 'registries to be asked: an image (host/repository:tag) or a host')
    .option('--containerd-config <file>', "containerd's configuration", '/etc/containerd/config.toml')
    .option('--json', 'as JSON')
    .addHelpText('after', '\nExit code 0: nothing is wrong, warnings aside; 1: something is.')
    .action(async (subjects: string[], options: DoctorOptions) => {
      const findings = await examine(nodeConfiguration(options), options.containerdConfig, subjects);
      const ok = findings.every(({ state }) => state !== 'wrong');
      await (options.json === true ? printJson({ ok, findings }) : print(renderFindings(findings)));
      process.exitCode = ok ? EXIT.done : EXIT.failed;
    });
}

export async function examine(
  configuration: Configuration,
  containerdConfiguration: string,
  subjects: readonly string[],
): Promise<readonly Finding[]> {
  const all = await Promise.all([
    guarded('kernel', 'kernel', () => lookAtKernel(configuration)),
    guarded('rights', 'rights', () => lookAtRights()),
    guarded('disk', 'disk', () => lookAtDisk(configuration)),
    guarded('daemon', 'daemons', () => lookAtDaemons(configuration)),
    guarded('containerd', 'containerd', () => lookAtContainerd(configuration, containerdConfiguration)),
    guarded('registry', 'registries', () => lookAtRegistries(configuration, subjects)),
  ]);
  return all.flat();
}

const MARKS: Readonly<Record<Finding['state'], string>> = {
  ok: 'ok',
  warning: 'WARNING',
  wrong: 'WRONG',
  skipped: '-',
};

export function renderFindings(findings: readonly Finding[]): string {
  const width = Math.max(...findings.map(({ what, area }) => area.length + 2 + what.length));
  const lines = findings.flatMap(({ area, what, state, found, advice }) => {
    const line = `${MARKS[state].padEnd(8)}${`${area}: ${what}`.padEnd(width)}  ${printable(found, 1000)}`;
    return advice === '' ? [line] : [line, `${' '.repeat(8)}-> ${printable(advice, 1000)}`];
  });
  const count = (state: Finding['state']): number =>
    findings.filter((finding) => finding.state === state).length;
  const verdict =
    count('wrong') > 0
      ? `${count('wrong')} wrong, ${count('warning')} warnings`
      : count('warning') > 0
        ? `nothing is wrong, ${count('warning')} warnings`
        : 'nothing is wrong';
  return `${lines.join('\n')}\n${verdict}\n`;
}
