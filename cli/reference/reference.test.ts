import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { homedir, tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { EXIT } from '../failure.js';
import { createProgram } from '../program.js';
import { completionScript } from './completion.js';
import { manPage } from './man-page.js';

const directory = mkdtempSync(path.join(tmpdir(), 'reference-'));
afterAll(() => rmSync(directory, { recursive: true }));

const program = createProgram();

describe('the manual page', () => {
  const page = manPage(program);
  const plain = page.replaceAll('\\-', '-');

  it('has every command, its options and every exit code', () => {
    for (const command of program.commands) {
      expect(plain).toContain(`.SS ${command.name()}\n`);
      for (const option of command.createHelp().visibleOptions(command))
        expect(plain).toContain(option.flags);
    }
    for (const code of Object.values(EXIT)) expect(page).toContain(`.B ${code}\n`);
    expect(plain).toContain('oci.zinfo=<file>');
    expect(page).not.toContain(homedir() === '/' ? '\0' : homedir());
  });

  it('is understood by groff without a warning', (context) => {
    const { status, stdout, stderr, error } = spawnSync('groff', ['-man', '-Kutf8', '-Tutf8', '-ww'], {
      input: page,
      encoding: 'utf8',
    });
    if (error !== undefined) return context.skip(`groff: ${error.message}`);
    expect([status, stderr]).toEqual([0, '']);
    // Bold is a character printed twice.
    expect(stdout.replace(/.[\b]/g, '')).toContain('SYNOPSIS');
  });

  it('says the same the second time', () => {
    expect(manPage(program)).toBe(page);
  });
});

describe('completion in bash', () => {
  const script = path.join(directory, 'completion.bash');
  writeFileSync(script, completionScript(program, 'bash'));
  writeFileSync(path.join(directory, 'a-file'), '');

  /** What TAB after these words offers; the last one is being written. */
  function offered(...words: string[]): string[] {
    const line =
      'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _erofs_nbd; printf "%s\\n" "${COMPREPLY[@]}"';
    const all = ['-c', line, 'bash', script, 'erofs-nbd', ...words];
    const said = execFileSync('bash', all, { cwd: directory, encoding: 'utf8' });
    return said.split('\n').filter((word) => word !== '');
  }

  it('offers commands, then their options, choices and files', () => {
    expect(offered('')).toEqual(expect.arrayContaining(program.commands.map((command) => command.name())));
    expect(offered('mo')).toEqual(['mount']);
    expect(offered('mount', '--ty')).toEqual(['--type']);
    expect(offered('mount', '--type', '')).toEqual(['erofs', 'erofs.nbd', 'erofs.fuse']);
    expect(offered('--debug', 'mount', '-t', 'erofs.n')).toEqual(['erofs.nbd']);
    expect(offered('mount', 'a-')).toEqual(['a-file']);
    expect(offered('inspect', '')).toContain('a-file');
    expect(offered('completion', 'b')).toEqual(['bash']);
    expect(offered('nothing', '')).toEqual([]);
  });
});
