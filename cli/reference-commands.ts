/**
 * `erofs-nbd completion SHELL` and `erofs-nbd man`: what a package or a user installs beside the program.
 */
import { Argument, type Command } from 'commander';
import { completionScript, type Shell, SHELLS } from './reference/completion.js';
import { manPage } from './reference/man-page.js';
import { print } from './terminal.js';

export function addReferenceCommands(program: Command): void {
  program
    .command('completion')
    .description('print a script that has a shell complete commands, options and files')
    .addArgument(new Argument('<shell>', 'which').choices(SHELLS))
    .action((shell: Shell) => print(completionScript(program, shell)));
  program
    .command('man')
    .description('print the manual page; "erofs-nbd man | man -l -" shows it')
    .action(() => print(manPage(program)));
}
