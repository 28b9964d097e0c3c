/**
 * The manual page, made of what the program itself says of its commands and options: there is one place that can be wrong.
 *
 * Source of the macros: man(7).
 */
import { homedir } from 'node:os';
import type { Command } from 'commander';
import { VERSION } from '../../daemon/version.js';
import { EXIT } from '../failure.js';

const EXIT_MEANINGS: Readonly<Record<keyof typeof EXIT, string>> = {
  done: 'It is done.',
  failed: 'It failed, or doctor or verify found something wrong. One line on standard error says what.',
  usage: 'It was called wrongly: an option, an argument or a combination of them.',
  interrupted: 'It was interrupted by SIGINT (Ctrl-C), and has left nothing behind.',
  terminated: 'The same by SIGTERM.',
  brokenPipe: 'Nobody reads what it prints any more.',
};

const FILES = [
  ['/etc/erofs-nbd/config.toml', 'The configuration of the daemons; it may be absent.'],
  ['/var/lib/erofs-nbd', 'The root of the snapshotter: snapshots, cache, indexes, database.'],
  ['/run/erofs-nbd-mount', 'What is mounted by erofs-nbd mount.'],
  ['/var/cache/erofs-nbd-mount', 'What was fetched for such mounts.'],
] as const;

/** @returns the page `erofs-nbd(1)` in roff */
export function manPage(program: Command): string {
  const help = program.createHelp();
  const commands = help.visibleCommands(program).filter((command) => command.name() !== 'help');
  return [
    `.\\" Made by \`${program.name()} man\`: do not change it here.`,
    `.TH ${program.name().toUpperCase()} 1 "" "${program.name()} ${VERSION}" "User Commands"`,
    '.SH NAME',
    `${text(program.name())} \\- ${text(program.description())}`,
    '.SH SYNOPSIS',
    ...commands.flatMap((command) => [synopsis(program, command), '.br']),
    '.SH OPTIONS',
    ...optionsOf(program),
    '.SH COMMANDS',
    ...commands.flatMap((command) => section(program, command)),
    '.SH EXIT STATUS',
    ...(Object.keys(EXIT) as (keyof typeof EXIT)[]).flatMap((name) =>
      item(String(EXIT[name]), EXIT_MEANINGS[name]),
    ),
    '.PP',
    text('With --json, what is said on standard error is one line of JSON: {"error": …, "exit": …}.'),
    '.SH FILES',
    ...FILES.flatMap(([file, meaning]) => item(file, meaning)),
    '.SH SEE ALSO',
    '.BR ctr (8),',
    '.BR mkfs.erofs (1),',
    '.BR mount (8);',
    text('/usr/share/doc/erofs-nbd/docs/operating.md'),
    '',
  ].join('\n');
}

function synopsis(program: Command, command: Command): string {
  return `.B ${text(`${program.name()} ${command.name()}`)}\n${text(command.usage())}`;
}

function section(program: Command, command: Command): string[] {
  const help = command.createHelp();
  return [
    `.SS ${text(command.name())}`,
    synopsis(program, command),
    '.PP',
    text(sentence(command.description())),
    ...help
      .visibleArguments(command)
      .flatMap((one) => item(help.argumentTerm(one), help.argumentDescription(one))),
    ...optionsOf(command),
    ...preformatted(textAfter(command)),
  ];
}

function optionsOf(command: Command): string[] {
  const help = command.createHelp();
  return help
    .visibleOptions(command)
    .flatMap((option) => item(help.optionTerm(option), help.optionDescription(option)));
}

/** What was added behind the help. */
function textAfter(command: Command): string {
  let all = '';
  const before = command.configureOutput();
  command.configureOutput({ ...before, writeOut: (piece) => (all += piece) });
  command.outputHelp();
  command.configureOutput(before);
  return all.slice(command.helpInformation().length).trim();
}

function item(term: string, meaning: string): string[] {
  return ['.TP', `.B ${text(term)}`, text(sentence(meaning))];
}

function preformatted(lines: string): string[] {
  return lines === '' ? [] : ['.PP', '.nf', ...lines.split('\n').map(text), '.fi'];
}

function sentence(words: string): string {
  const first = words.charAt(0).toUpperCase() + words.slice(1);
  return first === '' || /[.!?]$/.test(first) ? first : `${first}.`;
}

/** No character of it is a request or an escape; whose home directory it is made in is not told. */
function text(words: string): string {
  return words
    .replaceAll(homedir(), '~')
    .replaceAll('\\', '\\e')
    .replaceAll('-', '\\-')
    .replace(/^([.'])/gm, '\\&$1');
}
