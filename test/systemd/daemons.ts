/**
 * The daemons of the package in a Debian, as systemd and their own records tell of them.
 */
import type { DebianMachine } from './debian-machine.js';

export const UNIT = 'erofs-nbd-snapshotter.service';
export const ROOT = '/var/lib/erofs-nbd';

export class Daemons {
  constructor(private readonly machine: DebianMachine) {}

  mainPid(): Promise<string> {
    return this.machine.unit(UNIT, 'MainPID');
  }

  async blobserve(): Promise<string> {
    const said = await this.machine.run('cat', `${ROOT}/blobserve.json`);
    return String((JSON.parse(said) as { pid: number }).pid);
  }

  async runs(pid: string): Promise<boolean> {
    return (await this.machine.try('test', '-d', `/proc/${pid}`)).exitCode === 0;
  }

  /** How many descriptors systemd holds. */
  async stored(): Promise<number> {
    return Number(await this.machine.unit(UNIT, 'NFileDescriptorStore'));
  }

  async isActive(): Promise<boolean> {
    return (await this.machine.unit(UNIT, 'ActiveState')) === 'active';
  }

  /** Until the service is active and the data plane answers. */
  async whole(): Promise<void> {
    await this.machine.until('the service is active', () => this.isActive());
    await this.machine.until('the daemons answer', async () => {
      const { exitCode } = await this.machine.try('erofs-nbd', 'status', '--json');
      return exitCode === 0;
    });
  }
}
