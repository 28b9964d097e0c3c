/**
 * The mounter with real children. Those that must hang or die are little programs of the test's own; what mounts is the
 * built one, on an EROFS image.
 */
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { execa } from 'execa';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { patience } from '../test/patience.js';
import { mountAt } from './mount-table.js';
import { Mounter } from './mounter.js';

const BUILT = fileURLToPath(new URL('../dist/snapshotter/mount-child.js', import.meta.url));
const whyNot =
  process.getuid?.() !== 0
    ? 'mounting needs root'
    : existsSync(BUILT)
      ? undefined
      : 'not built: npm run build';

describe('the mounter', () => {
  let directory: string;
  let target: string;
  let mounter: Mounter | undefined;
  beforeEach(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'mounter-'));
    target = path.join(directory, 'target');
    await mkdir(target);
  });
  afterEach(async () => {
    mounter?.close();
    while ((await mountAt(target)) !== undefined) await execa('umount', [target]);
    await rm(directory, { recursive: true, force: true });
  });

  /** A child that handles `request` like this; it notes its pid in a file when it starts. */
  const child = async (body: string): Promise<string> => {
    const program = path.join(directory, 'child.mjs');
    await writeFile(
      program,
      `import fs from 'node:fs';
       fs.appendFileSync(${JSON.stringify(path.join(directory, 'pids'))}, process.pid + '\\n');
       process.on('disconnect', () => process.exit(0));
       process.on('message', (request) => { ${body} });`,
    );
    return program;
  };
  const pids = async (): Promise<string[]> =>
    (await readFile(path.join(directory, 'pids'), 'utf8')).trimEnd().split('\n');

  it('uses a child again, and no more of them than allowed', async () => {
    const program = await child('setTimeout(() => process.send({ ok: true }), 20)');
    mounter = new Mounter({ timeoutMs: 10_000, maxChildren: 2, program });
    const shared = mounter;
    await Promise.all(Array.from({ length: 10 }, () => shared.unmount(target)));
    await mounter.unmount(target);
    expect((await pids()).length).toBeLessThanOrEqual(2);
  });

  it('has a child started for what is expected, one, which the next call takes', async () => {
    const program = await child('process.send({ ok: true })');
    mounter = new Mounter({ timeoutMs: 10_000, idleMs: patience(10_000), program });
    mounter.expect();
    mounter.expect();
    await expect.poll(() => pids().catch(() => []), { timeout: patience(8000) }).toHaveLength(1);
    await mounter.unmount(target);
    mounter.expect();
    await mounter.unmount(target);
    expect(await pids()).toHaveLength(1);
  });

  it('gives up a child that hangs, and other calls go on', async () => {
    const program = await child("if (request.operation === 'unmount') process.send({ ok: true })");
    // The other call has as long, and a child to be started in it, on a machine that may be busy.
    const timeoutMs = patience(5000);
    mounter = new Mounter({ timeoutMs, maxChildren: 1, program });
    const hanging = mounter.mountErofs('source', target);
    const other = mounter.unmount(target);
    await expect(hanging).rejects.toMatchObject({
      code: 'ETIMEDOUT',
      message: `mount of source on ${target}: no answer within ${timeoutMs} ms`,
    });
    await other;
    expect(await pids()).toHaveLength(2);
  });

  it('tells of a child that dies, and starts another for the next call', async () => {
    const program = await child(
      "if (request.operation === 'mount') process.exit(3); else process.send({ ok: true })",
    );
    mounter = new Mounter({ timeoutMs: 10_000, maxChildren: 1, program });
    await expect(mounter.mountErofs('source', target)).rejects.toThrow(
      `mount of source on ${target}: child ended (3)`,
    );
    await mounter.unmount(target);
  });

  it('survives an idle child that dies', async () => {
    const program = await child('process.send({ ok: true }); setTimeout(() => process.exit(1), 5)');
    mounter = new Mounter({ timeoutMs: 10_000, maxChildren: 1, program });
    await mounter.unmount(target);
    const [first] = await pids();
    await expect.poll(() => existsSync(`/proc/${first}/cmdline`)).toBe(false);
    await mounter.unmount(target);
    expect(await pids()).toHaveLength(2);
  });

  it('lets idle children end', async () => {
    const program = await child('process.send({ ok: true })');
    mounter = new Mounter({ timeoutMs: 10_000, idleMs: 10, program });
    await mounter.unmount(target);
    const [first] = await pids();
    await expect.poll(() => existsSync(`/proc/${first}/cmdline`)).toBe(false);
  });

  describe.skipIf(whyNot !== undefined)('with the kernel', () => {
    it('says what the kernel has against a source, and against an unmount', async () => {
      mounter = new Mounter({ timeoutMs: 10_000, program: BUILT });
      const image = path.join(directory, 'no-image');
      await writeFile(image, Buffer.alloc(8192));
      await expect(mounter.mountErofs(image, target)).rejects.toMatchObject({
        name: 'MountError',
        code: expect.stringMatching(/^(EINVAL|ENOTBLK)$/) as string,
        message: expect.stringContaining(target) as string,
      });
      await expect(mounter.mountErofs(path.join(directory, 'nothing'), target)).rejects.toMatchObject({
        code: 'ENOENT',
      });
      await expect(mounter.unmount(target)).rejects.toMatchObject({ code: 'EINVAL' });
    });

    it('refuses to unmount what is in use, unless it may be done lazily', async () => {
      mounter = new Mounter({ timeoutMs: 10_000, program: BUILT });
      await execa('mount', ['-t', 'tmpfs', 'none', target]);
      const user = execa('sleep', ['600'], { cwd: target, reject: false });
      await expect(mounter.unmount(target)).rejects.toMatchObject({ code: 'EBUSY' });
      expect(await mountAt(target)).toBeDefined();
      await mounter.unmount(target, true);
      expect(await mountAt(target)).toBeUndefined();
      user.kill('SIGKILL');
      await user;
    });
  });
});
