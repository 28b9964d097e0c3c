/**
 * What every command does when it is called wrongly, fails, is interrupted, or nobody reads what it prints.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { COMMAND, erofsNbd, NOBODY, nobodyCannot } from './run-command.js';

let directory: string;
beforeAll(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'erofs-nbd-command-'));
});
afterAll(async () => {
  await rm(directory, { recursive: true });
});

const nowhere = (): string[] => ['--root', path.join(directory, 'nowhere')];

describe('the command erofs-nbd', () => {
  it.each([
    [['status', '--nope'], "unknown option '--nope'"],
    [['status', 'more'], 'too many arguments'],
    [['top', '--interval', 'soon'], 'Expected 0.1 to 86400 seconds'],
    [['bogus'], "unknown command 'bogus'"],
    [['inspect'], "missing required argument 'file'"],
    [[], 'a command is missing'],
  ])('called wrongly (%j) says so in one line, then the usage, and ends with 2', async (words, said) => {
    const { exitCode, stdout, stderr } = await erofsNbd(words);
    expect(exitCode).toBe(2);
    expect(stdout).toBe('');
    const [first, second, ...rest] = stderr.split('\n');
    expect(first).toMatch(/^erofs-nbd( \w+)?: /);
    expect(first).toContain(said);
    expect(second).toMatch(/^usage: erofs-nbd/);
    expect(rest).toEqual(['']);
  });

  it('that fails says why in one line without a stack, and ends with 1', async () => {
    const { exitCode, stdout, stderr } = await erofsNbd(['status', ...nowhere()]);
    expect(exitCode).toBe(1);
    expect(stdout).toBe('');
    expect(stderr).toBe(
      `erofs-nbd status: nothing serves layers below ${directory}/nowhere: is erofs-nbd-snapshotter running, and is ` +
        'that its root (--root)?\n',
    );
  });

  it('says it in JSON to who wants JSON, wrong usage too', async () => {
    const failed = await erofsNbd(['status', '--json', ...nowhere()]);
    expect(failed.exitCode).toBe(1);
    expect(failed.stdout).toBe('');
    expect(JSON.parse(failed.stderr)).toEqual({
      error: expect.stringContaining('nothing serves layers') as string,
      exit: 1,
    });
    const wrong = await erofsNbd(['status', '--json', '--nope']);
    expect(wrong.exitCode).toBe(2);
    expect(JSON.parse(wrong.stderr)).toEqual({
      error: "unknown option '--nope'",
      exit: 2,
      usage: 'erofs-nbd status [options]',
    });
  });

  it('shows its stack when it is asked to', async () => {
    const { exitCode, stderr } = await erofsNbd(['--debug', 'status', ...nowhere()]);
    expect(exitCode).toBe(1);
    expect(stderr).toMatch(/^Failure: nothing serves.*\n\s+at /);
  });

  it('names the setting that is wrong in the configuration', async () => {
    const { exitCode, stderr } = await erofsNbd(['status', '--config', '/does/not/exist.toml']);
    expect([exitCode, stderr]).toEqual([
      1,
      'erofs-nbd status: /does/not/exist.toml: cannot be read (ENOENT)\n',
    ]);
  });

  it('prints help and version to standard output, and ends with 0', async () => {
    const help = await erofsNbd(['--help']);
    expect([help.exitCode, help.stderr]).toEqual([0, '']);
    expect(help.stdout).toContain('Usage: erofs-nbd [options] [command]');
    const version = await erofsNbd(['--version']);
    expect([version.exitCode, version.stdout]).toEqual([0, expect.stringMatching(/^\d+\.\d+\.\d+\n$/)]);
  });

  it('is silent when nobody reads what it prints', async () => {
    const child = spawn(process.execPath, [COMMAND, 'doctor', ...nowhere()], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    child.stdout.destroy();
    let said = '';
    child.stderr.setEncoding('utf8').on('data', (piece: string) => (said += piece));
    const [code] = (await once(child, 'close')) as [number];
    expect([code, said]).toEqual([141, '']);
  });

  it('says which capabilities are missing, and why they are needed, when it is not root', async (context) => {
    const missing = await nobodyCannot();
    if (missing !== undefined) return context.skip(missing);
    const { exitCode, stdout } = await erofsNbd(['doctor', '--json', ...nowhere()], NOBODY);
    expect(exitCode).toBe(1);
    const { findings } = JSON.parse(stdout) as {
      findings: { area: string; found: string; advice: string }[];
    };
    const rights = findings.find(({ area }) => area === 'rights');
    expect(rights?.found).toContain(
      'user 65534 lacks CAP_SYS_ADMIN (to mount file systems and to attach devices)',
    );
    expect(rights?.advice).toBe('run this and the snapshotter as root');
  });
});
