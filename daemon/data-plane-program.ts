/**
 * The program of the data plane and the options of V8 that it runs with: they are part of what its compiled code is good for.
 */
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

/**
 * The bytes that are served lie outside V8's heap, and the objects about them die young: V8's own 3 x 16 MB for young
 * objects are 25 MB resident that bring nothing. In MB.
 */
const YOUNG_HEAP = '--max-semi-space-size=4';

/** All modules in one file, started by `start-bundle.cts`; `npm run build` makes it. */
const BUNDLE = fileURLToPath(new URL('../programs/blobserve.cjs', import.meta.url));
const MODULES = fileURLToPath(new URL('../blobserve/main.js', import.meta.url));

/** @returns arguments of Node.js that start the data plane; its own follow */
export function dataPlaneCommand(): readonly string[] {
  // What tsc alone has compiled runs too.
  return existsSync(BUNDLE) ? [YOUNG_HEAP, BUNDLE] : ['--enable-source-maps', YOUNG_HEAP, MODULES];
}
