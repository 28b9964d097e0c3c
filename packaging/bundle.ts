/**
 * Puts all modules of the data plane into one file, `dist/programs/blobserve-<hash>.cjs`, and the program that starts it beside it
 * (`dist/programs/blobserve.cjs`, see `daemon/start-bundle.cts`). Threads and child programs stay the modules they are.
 *
 * Run by `npm run build`, on what tsc has made.
 */
import { mkdir, readFile, readdir, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { build, type Plugin } from 'esbuild';

const DIST = fileURLToPath(new URL('..', import.meta.url));
const PROGRAMS = path.join(DIST, 'programs');

/** Each module finds its neighbours (threads, child programs, package.json) from where it lay, not from where the bundle lies. */
const keepPlaces: Plugin = {
  name: 'keep-places',
  setup(build) {
    build.onLoad({ filter: /\.js$/ }, async ({ path: file }) => {
      if (!file.startsWith(DIST) || file.includes('/node_modules/')) return undefined;
      const text = await readFile(file, 'utf8');
      const place = `new URL(${JSON.stringify(path.relative(PROGRAMS, file))}, bundlePlace).href`;
      return { contents: text.replace(/^#!.*/, '').replaceAll('import.meta.url', place), loader: 'js' };
    });
  },
};

const { outputFiles } = await build({
  entryPoints: [path.join(DIST, 'blobserve/main.js')],
  outdir: PROGRAMS,
  entryNames: 'blobserve-[hash]',
  outExtension: { '.js': '.cjs' },
  bundle: true,
  platform: 'node',
  format: 'cjs',
  target: 'node20.18',
  // The native one, and those that are loaded only where the configuration asks for them.
  external: ['koffi', 'pino-pretty', '@opentelemetry/*'],
  // Names stay, and lines stay short enough to say something in a stack trace.
  minifyWhitespace: true,
  minifySyntax: true,
  lineLimit: 160,
  charset: 'ascii',
  legalComments: 'eof',
  banner: { js: 'const bundlePlace=require("node:url").pathToFileURL(__filename);' },
  // A script of `node:vm` has nobody who would import for it: optional packages are required.
  supported: { 'dynamic-import': false },
  plugins: [keepPlaces],
  logLevel: 'warning',
  write: false,
});
const [bundle] = outputFiles;
if (bundle === undefined || outputFiles.length !== 1) {
  throw new Error(`the data plane is bundled into one file, not ${outputFiles.length}`);
}
const name = path.basename(bundle.path);
const program = path.join(PROGRAMS, 'blobserve.cjs');
await mkdir(PROGRAMS, { recursive: true });
// A data plane may be starting from what an earlier build has made: files are replaced whole, the program last.
await writeWhole(bundle.path, bundle.contents);
await writeWhole(
  program,
  `require('../daemon/start-bundle.cjs').startBundle(require('node:path').join(__dirname, '${name}'));\n`,
);
for (const entry of await readdir(PROGRAMS)) {
  if (!entry.startsWith(name) && entry !== path.basename(program)) await rm(path.join(PROGRAMS, entry));
}

async function writeWhole(file: string, contents: string | Uint8Array): Promise<void> {
  const partial = `${file}.${String(process.pid)}`;
  await writeFile(partial, contents);
  await rename(partial, file);
}
