/**
 * Compiles the data plane for the Node.js that runs this, beside its program: once for each installation and each Node.js. Without it, or
 * with another Node.js, the data plane starts a little slower.
 */
import { execa } from 'execa';
import { dataPlaneCommand } from './data-plane-program.js';

await execa(process.execPath, [...dataPlaneCommand(), '--write-code-cache'], {
  stdout: 'ignore',
  stderr: 'inherit',
});
