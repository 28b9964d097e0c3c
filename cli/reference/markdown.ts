/**
 * `docs/commands.md`: every command with its options, made of what the program itself says of them.
 */
import type { Command } from 'commander';

/**
 * @param daemon the command line of the snapshotter
 * @param defaults replaced in what the program says, where it differs between users: a home directory, an architecture
 */
export function commandsPage(
  program: Command,
  daemon: Command,
  defaults: Readonly<Record<string, string>> = {},
): string {
  const help = program.createHelp();
  const commands = help.visibleCommands(program).filter((command) => command.name() !== 'help');
  const page = [
    '# Commands',
    '',
    'Every command and option of `erofs-nbd` and of the daemon, as `--help` says them; [operating](operating.md#the-command-erofs-nbd) has what they',
    'are for, and the exit codes. A test compares this page with the program (`npx vitest run -u cli/reference` writes it anew).',
    '',
    ...commands.flatMap((command) => section(`${program.name()} ${command.name()}`, command)),
    ...section(daemon.name(), daemon),
  ].join('\n');
  return Object.entries(defaults).reduce((text, [here, shown]) => text.replaceAll(here, shown), page);
}

function section(name: string, command: Command): string[] {
  const help = command.createHelp();
  const rows = [
    ...help.visibleArguments(command).map((one) => [help.argumentTerm(one), help.argumentDescription(one)]),
    ...help.visibleOptions(command).map((one) => [help.optionTerm(one), help.optionDescription(one)]),
  ];
  return [
    `## ${name}`,
    '',
    `\`${name} ${command.usage()}\``,
    '',
    `${command.description()}.`,
    '',
    '| | |',
    '|---|---|',
    ...rows.map(([term = '', meaning = '']) => `| \`${cell(term)}\` | ${cell(meaning)} |`),
    '',
  ];
}

/** One line, without what ends a cell, or is taken for HTML. */
function cell(text: string): string {
  return text.replace(/\s+/g, ' ').replaceAll('|', '\\|');
}
