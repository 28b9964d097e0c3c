/** A tar.gz like a base image's layer, for the benchmarks that need one. */
import { execFileSync } from 'node:child_process';
import { existsSync, statSync } from 'node:fs';
import path from 'node:path';

/**
 * Packs this machine's Node, Perl and documentation (about 200 MB) into `layer.tar` and `layer.tar.gz` (gzip -6).
 *
 * @param bytes how large the tar has to be at least: the same files again, in other directories, until it is
 * @returns the two paths
 */
export function makeLayer(directory: string, bytes = 0): { tar: string; layer: string } {
  const tar = path.join(directory, 'layer.tar');
  const layer = `${tar}.gz`;
  const node = path.dirname(path.dirname(process.execPath));
  // A Node from a distribution lies in /usr: its program alone then.
  const sources = [
    node === '/usr' ? process.execPath : node,
    '/usr/share/perl',
    '/usr/lib/x86_64-linux-gnu/perl-base',
    '/usr/share/doc',
  ].filter((source) => existsSync(source));
  const pack = (...options: string[]): void => {
    execFileSync('tar', [...options, tar, '--ignore-failed-read', '--warning=none', ...sources], {
      stdio: 'ignore',
    });
  };
  pack('-cf');
  for (let copy = 2; statSync(tar).size < bytes; copy++) pack(`--transform=s,^,copy-${copy}/,rSh`, '-rf');
  execFileSync('sh', ['-c', 'gzip -6nc "$0" > "$1"', tar, layer]);
  return { tar, layer };
}
