/**
 * What a shell completes, made of the program's own commands and options: a script that knows them, so that a shell need
 * not start Node.js at every TAB, which takes a third of a second.
 */
import type { Argument, Command, Option } from 'commander';

export const SHELLS = ['bash', 'zsh'] as const;
export type Shell = (typeof SHELLS)[number];

/** How words for a value are found: `-W` of a list, `-f` and `-d` of files and directories; empty: it is free. */
type Generator = string;

/** @returns a script for the shell to read at its start */
export function completionScript(program: Command, shell: Shell): string {
  const commands = program.createHelp().visibleCommands(program);
  const name = program.name();
  const script = `_erofs_nbd() {
  local current=\${COMP_WORDS[COMP_CWORD]} previous=\${COMP_WORDS[COMP_CWORD-1]} command= word at
  for ((at = 1; at < COMP_CWORD; at++)); do
    word=\${COMP_WORDS[at]}
    case $word in -*) ;; *) command=$word; break ;; esac
  done
  COMPREPLY=()
  case $command:$previous in
${commands.flatMap(valueCases).join('\n')}
  esac
  if [ -z "$command" ]; then
    COMPREPLY=($(compgen -W ${quoted([...commands.map((one) => one.name()), ...longOptions(program)])} -- "$current"))
    return
  fi
  case $command in
${commands.map(commandCase).join('\n')}
  esac
}
complete -o filenames -F _erofs_nbd ${name}
`;
  const header = `# Completion of ${name} for ${shell}, made by \`${name} completion ${shell}\`.\n`;
  return shell === 'bash'
    ? `${header}${script}`
    : `#compdef ${name}\n${header}autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n${script}`;
}

/** Options of a command whose value comes next. */
function valueCases(command: Command): string[] {
  return command
    .createHelp()
    .visibleOptions(command)
    .filter((option) => option.required || option.optional)
    .map((option) => {
      const words = flags(option).map((flag) => `${command.name()}:${flag}`);
      const generator = generatorOf(option.flags, option.argChoices);
      return `    ${words.join('|')}) ${reply(generator)} return ;;`;
    });
}

function commandCase(command: Command): string {
  const options = quoted(longOptions(command));
  const generator = command.registeredArguments.map(generatorOfArgument).find((one) => one !== '') ?? '';
  return (
    `    ${command.name()})\n` +
    `      case $current in -*) COMPREPLY=($(compgen -W ${options} -- "$current")) ;; *) ${reply(generator)} ;; esac ;;`
  );
}

function reply(generator: Generator): string {
  return generator === '' ? ':;' : `COMPREPLY=($(compgen ${generator} -- "$current"));`;
}

function generatorOfArgument(argument: Argument): Generator {
  return generatorOf(argument.name(), argument.argChoices);
}

/** By the word that stands for the value in the help. */
function generatorOf(placeholder: string, choices: readonly string[] | undefined): Generator {
  if (choices !== undefined) return `-W ${quoted(choices)}`;
  if (/file|source|socket/.test(placeholder)) return '-f';
  return placeholder.includes('directory') ? '-d' : '';
}

function longOptions(command: Command): string[] {
  return command
    .createHelp()
    .visibleOptions(command)
    .flatMap((option) => option.long ?? []);
}

function flags({ short, long }: Option): string[] {
  return [short, long].filter((flag) => flag !== undefined);
}

/** As one word of the shell. Names of commands and options have no quotes. */
function quoted(words: readonly string[]): string {
  return `'${words.join(' ')}'`;
}
