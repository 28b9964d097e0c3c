/**
 * Libraries that a privately unpacked program needs and this system does not have: unpacked privately too, and given to
 * that program alone.
 */
import { chmod, mkdir, readdir, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';

/** Names of the libraries the loader does not find. */
async function missingLibraries(file: string, libraryPath: string): Promise<string[]> {
  const { stdout } = await execa('ldd', [file], { reject: false, env: { LD_LIBRARY_PATH: libraryPath } });
  return [...stdout.matchAll(/^\s*(\S+) => not found$/gm)].map(([, name = '']) => name);
}

/**
 * @param file the program, in an unpacked package
 * @param fetchAll unpacks the package with everything it depends on into a directory
 * @returns the program, or a script beside it that runs it with the libraries it lacks here
 */
export async function withMissingLibraries(
  file: string,
  fetchAll: (directory: string) => Promise<void>,
): Promise<string> {
  if ((await missingLibraries(file, '')).length === 0) return file;
  const base = `${file}.libraries`;
  const [all, own] = [path.join(base, 'all'), path.join(base, 'own')];
  await fetchAll(all);
  await mkdir(own, { recursive: true });
  const libraries = new Map<string, string>();
  for (const entry of await readdir(all, { recursive: true, withFileTypes: true })) {
    if (/\.so(\.|$)/.test(entry.name)) libraries.set(entry.name, path.join(entry.parentPath, entry.name));
  }
  // Only those that are missing: never another libc beside this system's loader. Each may need more.
  for (;;) {
    const missing = await missingLibraries(file, own);
    if (missing.length === 0) break;
    for (const name of missing) {
      const found = libraries.get(name);
      if (found === undefined)
        throw new Error(`${file} needs ${name}, which none of its package's dependencies has`);
      await symlink(found, path.join(own, name));
    }
  }
  const script = `${file}.with-libraries`;
  await writeFile(script, `#!/bin/sh\nLD_LIBRARY_PATH='${own}' exec '${file}' "$@"\n`);
  await chmod(script, 0o755);
  return script;
}
