/** That the pages name the commands and options there are, and no others. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { homedir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { formatPlatform, machinePlatform } from '../../blobserve/registry/platform.js';
import { snapshotterCommand } from '../../snapshotter/command-line.js';
import { EXIT } from '../failure.js';
import { createProgram } from '../program.js';
import { commandsPage } from './markdown.js';

const docs = fileURLToPath(new URL('../../docs', import.meta.url));
const program = createProgram();
const commands = program.commands.map((command) => command.name());

/** Text of a page, by its path below the checkout. */
const pages = new Map(
  [
    '../README.md',
    ...readdirSync(docs, { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.md')),
  ].map((name) => [name, readFileSync(path.join(docs, name), 'utf8')]),
);

describe('docs/commands.md', () => {
  it('lists exactly the commands and options that there are', async () => {
    const page = commandsPage(program, snapshotterCommand(), {
      [homedir()]: '~',
      [formatPlatform(machinePlatform())]: 'linux/amd64',
    });
    await expect(page).toMatchFileSnapshot(path.join(docs, 'commands.md'));
  });
});

describe('the pages', () => {
  it('speak of no command that there is not', () => {
    const named = [...pages].flatMap(([page, text]) =>
      [...text.matchAll(/`erofs-nbd ([a-z][a-z-]*)\b/g)].map(([, name = '']) => ({
        page,
        name,
      })),
    );
    expect(named.length).toBeGreaterThan(20);
    expect(named.filter(({ name }) => !commands.includes(name))).toEqual([]);
  });

  it('give a command only options that it has', () => {
    const given = [...pages].flatMap(([page, text]) =>
      [...text.matchAll(/^[ $#`]*(?:.*[`|] *)?erofs-nbd ([a-z-]+)( [^`|\n#]*)/gm)].flatMap(
        ([, name = '', rest = '']) =>
          [...rest.matchAll(/(?<= )--[a-z-]+/g)].map(([option]) => ({ page, name, option })),
      ),
    );
    expect(given.length).toBeGreaterThan(3);
    const unknown = given.filter(({ name, option }) => {
      const command = program.commands.find((one) => one.name() === name);
      const options = command?.createHelp().visibleOptions(command) ?? [];
      return !options.some(({ long }) => long === option);
    });
    expect(unknown).toEqual([]);
  });

  it('link to pages and headings that there are', () => {
    const slug = (heading: string): string =>
      heading
        .toLowerCase()
        .replace(/[^\p{L}\p{N}_\- ]/gu, '')
        .replaceAll(' ', '-');
    const headings = (text: string): string[] =>
      [...text.replace(/```[\s\S]*?```/g, '').matchAll(/^#+ (.*)$/gm)].map(([, heading = '']) =>
        slug(heading),
      );
    const broken = [...pages].flatMap(([page, text]) =>
      [...text.matchAll(/\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)/g)].flatMap(
        ([link, target = '', anchor]) => {
          const file = target === '' ? page : path.join(path.dirname(page), target);
          if (!existsSync(path.join(docs, file))) return [{ page, link }];
          const known = pages.get(file);
          return anchor === undefined || known === undefined || headings(known).includes(anchor)
            ? []
            : [{ page, link }];
        },
      ),
    );
    expect(broken).toEqual([]);
  });

  it('have operating.md tell of every command, and of every exit code', () => {
    const text = pages.get('operating.md') ?? '';
    const table = text.slice(text.indexOf('## The command'), text.indexOf('Failures are one line'));
    const told = commands.filter((name) => new RegExp(`^\\| .*\`(?:erofs-nbd )?${name}\\b`, 'm').test(table));
    expect(told).toEqual(commands.filter((name) => name !== 'pull'));
    // Its own page: docs/clients/ctr.md.
    expect(pages.get('clients/ctr.md')).toContain('erofs-nbd pull');
    const codes = table.slice(table.indexOf('Exit codes'));
    for (const code of Object.values(EXIT)) expect(codes).toMatch(new RegExp(`\\b${code}\\b`));
  });
});
