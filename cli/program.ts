/**
 * The command `erofs-nbd`: its subcommands, one file each, which add themselves to it.
 */
import { Command } from 'commander';
import { VERSION } from '../daemon/version.js';
import { addConvertCommand } from './convert-command.js';
import { addDoctorCommand } from './doctor.js';
import { addInspectCommand } from './inspect.js';
import { addGcCommand } from './gc-command.js';
import { addIndexCommand } from './index-command.js';
import { addMountCommand } from './mount-command.js';
import { addListCommand, addReattachCommand, addUmountCommand } from './mounts-commands.js';
import { addPrefetchCommand } from './prefetch-command.js';
import { addReportCommand } from './report-command.js';
import { addReferenceCommands } from './reference-commands.js';
import { addStatusCommand } from './status.js';
import { addTopCommand } from './top.js';
import { addVerifyCommand } from './verify-command.js';
import { addPullCommand } from './pull-command.js';

/** Errors are thrown (CommanderError), not printed: `main.ts` says them in the form that is wanted. */
export function createProgram(): Command {
  const program = new Command('erofs-nbd')
    .description('looks after layers that are served lazily')
    .version(VERSION)
    .option('--debug', 'print stack traces')
    .exitOverride()
    .configureOutput({ outputError: () => undefined, writeErr: () => undefined });
  // Here each subcommand's file adds its command, in the order of the help.
  addPullCommand(program);
  addPrefetchCommand(program);
  addIndexCommand(program);
  addConvertCommand(program);
  addMountCommand(program);
  addUmountCommand(program);
  addListCommand(program);
  addReattachCommand(program);
  addStatusCommand(program);
  addTopCommand(program);
  addReportCommand(program);
  addGcCommand(program);
  addVerifyCommand(program);
  addDoctorCommand(program);
  addInspectCommand(program);
  addReferenceCommands(program);
  return program;
}
