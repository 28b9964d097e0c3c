/**
 * Every command of README.md and docs, run as it is written in a clean root, and what it prints compared with what the page
 * shows. For `registry.example.com/app:1`, which the pages say stands for an image, the image of a registry on loopback is put in.
 */
import { copyFile, mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { checkout, containerdFrom, program } from '../debian/packages.js';
import { blobPath } from '../image/layer-blob.js';
import { architecture } from '../image/oci-layout.js';
import { buildTinyImage } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import { Stack } from '../stack/stack.js';
import { brief, missingForSystemTests } from '../system/requirements.js';
import { runInCleanRoot, type Outcome, type Step } from './clean-root.js';
import { documentedCommands, isAsShown } from './commands.js';
import { DAEMONS, EXCEPTIONS } from './exceptions.js';

const missing = brief ? 'not on a machine that emulates every instruction' : await missingForSystemTests();

/** Pages whose commands go on from one another; the others come between these, and what takes everything away is last. */
const FIRST = ['README.md', 'docs/quick-start.md'];
const LAST = ['docs/operating.md'];
const PLACEHOLDER = 'registry.example.com/app:1';

const commands = await documentedCommands();
const place = (page: string): number =>
  FIRST.includes(page) ? FIRST.indexOf(page) - 10 : LAST.indexOf(page);
commands.sort((a, b) => place(a.page) - place(b.page));
const wanted = commands.filter(({ command }) => {
  const exception = EXCEPTIONS[command];
  return exception === undefined || exception.instead !== undefined;
});

describe('the commands that cannot be run here', () => {
  it('are all in the documentation', () => {
    const known = new Set(commands.map(({ command }) => command));
    expect([...Object.keys(EXCEPTIONS), ...DAEMONS].filter((command) => !known.has(command))).toEqual([]);
  });
});

describe('what a page shows', () => {
  it('is compared line by line, with room for what is another thing every time', () => {
    expect(isAsShown('a … c\n', 'a b c\n')).toBe(true);
    expect(isAsShown('a … c\n', 'a b d\n')).toBe(false);
    expect(isAsShown('first\n…\nlast\n', 'first\n1\n2\nlast\n')).toBe(true);
    expect(isAsShown('first\nlast\n', 'first\n1\nlast\n')).toBe(false);
    expect(isAsShown('NAME  SIZE\n', 'NAME       SIZE\n')).toBe(true);
  });
});

describe('in a clean root', () => {
  let stack: Stack;
  let outcomes: Outcome[] = [];

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    const registry = await stack.startRegistry();
    const image = await buildTinyImage({ format: 'tar+gzip' });
    const reference = await registry.push(image, 'app:1');
    const work = path.join(stack.directory, 'work');
    const own = path.join(stack.directory, 'bin');
    await mkdir(work);
    await mkdir(own);
    await copyFile(blobPath(image.layout, image.layers[0]?.digest ?? ''), path.join(work, 'layer.tar.gz'));
    for (const [name, file] of [
      ['erofs-nbd', 'cli/main.js'],
      ['erofs-nbd-snapshotter', 'snapshotter/main.js'],
    ] as const) {
      const script = `#!/bin/sh\nexec ${process.execPath} ${path.join(checkout, 'dist', file)} "$@"\n`;
      await writeFile(path.join(own, name), script, { mode: 0o755 });
    }
    const steps = wanted.map(({ page, command }): Step => {
      const written = EXCEPTIONS[command]?.instead ?? command;
      return {
        command: written.replaceAll(PLACEHOLDER, reference),
        daemon: DAEMONS.has(command),
        workingDirectory: page === 'README.md' ? checkout : work,
      };
    });
    const runc = path.dirname(await program('runc'));
    outcomes = await runInCleanRoot(
      {
        directory: stack.directory,
        programs: [own, await containerdFrom('sid'), runc, path.dirname(process.execPath)],
        files: {
          '/etc/containerd/config.toml': await containerdConfiguration(),
          '/etc/erofs-nbd/config.toml': await readFile(path.join(checkout, 'config.toml'), 'utf8'),
        },
        prepare:
          'mkdir -p /run/lock; containerd >"$D/containerd.log" 2>&1 </dev/null & wait_for /run/containerd/containerd.sock',
        timeoutMs: patience(120_000),
      },
      steps,
    );
  });
  afterAll(async () => {
    expect(await stack?.remove()).toEqual(missing === undefined ? [] : undefined);
  });

  for (const [number, { page, command, prints }] of wanted.entries()) {
    it(`${page}: ${command}`, (context) => {
      if (missing !== undefined) return context.skip(missing);
      const { code, stdout, stderr } = outcomes[number] ?? expect.fail();
      expect(code, `${command}: ${stderr}`).toBe(0);
      if (prints === undefined || isAsShown(prints, stdout)) return;
      expect(stdout).toBe(prints);
    });
  }
});

/** As README.md has it. */
async function containerdConfiguration(): Promise<string> {
  const text = await readFile(path.join(checkout, 'README.md'), 'utf8');
  const block =
    /^( *)```toml\n([\s\S]*?)^ *```$/m.exec(text)?.[2] ?? expect.fail('README.md has no configuration');
  return block.replaceAll('linux/amd64', `linux/${architecture()}`);
}
