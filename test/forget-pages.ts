import { execa } from 'execa';
import { patience } from './patience.js';

/**
 * Has the kernel drop what it has of one file or one device, so that the next read asks whoever serves it. In a child: this process
 * may be who does.
 */
export async function forgetPages(file: string): Promise<void> {
  const parameters = [`if=${file}`, 'iflag=nocache', 'count=0', 'status=none'];
  await execa('dd', parameters, { timeout: patience(20_000), killSignal: 'SIGKILL' });
}
