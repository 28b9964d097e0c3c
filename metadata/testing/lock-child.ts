/**
 * A daemon as far as the root lock is concerned: takes it, says `locked` or the error, and stays until its standard input
 * ends.
 *
 *     lock-child ROOT ADDRESS
 */
import { RootInUseError, lockRoot } from '../root-lock.js';

const [root = '', address = ''] = process.argv.slice(2);
try {
  const lock = lockRoot(root, { address, version: '1.2.3', patienceMs: 0 });
  process.stdout.write('locked\n');
  process.stdin.on('end', () => lock.release()).resume();
} catch (error) {
  if (!(error instanceof RootInUseError)) throw error;
  process.stdout.write(`${JSON.stringify({ message: error.message, owner: error.owner })}\n`);
}
