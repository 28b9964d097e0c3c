import { spawn, type ChildProcessWithoutNullStreams } from 'node:child_process';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

/** Starts one of the programs beside this file as a process of its own, without a build: vitest brings vite-node. */
export function spawnTypescript(program: string, args: readonly string[]): ChildProcessWithoutNullStreams {
  const viteNode = createRequire(createRequire(import.meta.url).resolve('vitest/package.json')).resolve(
    'vite-node/vite-node.mjs',
  );
  const script = fileURLToPath(new URL(program, import.meta.url));
  return spawn(process.execPath, [viteNode, '--script', script, ...args], { stdio: 'pipe' });
}
