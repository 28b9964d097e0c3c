#!/usr/bin/env node
/**
 * `erofs-nbd`: the command an operator types.
 */
import process from 'node:process';
import type { Command } from 'commander';
import { describeFailure } from './failure.js';
import { createProgram } from './program.js';
import { endWithBrokenPipe, Interrupted } from './terminal.js';

/** The subcommand that was asked for, also when its options could not be parsed. */
function commandCalled(program: Command, words: readonly string[]): Command {
  let command = program;
  for (const word of words) {
    if (word.startsWith('-')) continue;
    const next = command.commands.find((one) => one.name() === word || one.aliases().includes(word));
    if (next === undefined) break;
    command = next;
  }
  return command;
}

async function main(): Promise<void> {
  endWithBrokenPipe();
  const program = createProgram();
  const words = process.argv.slice(2);
  try {
    await program.parseAsync();
  } catch (error) {
    if (error instanceof Interrupted) {
      process.exitCode = error.exitCode;
      return;
    }
    const options = words.includes('--') ? words.slice(0, words.indexOf('--')) : words;
    const { exitCode, text } = describeFailure(error, commandCalled(program, words), {
      json: options.includes('--json'),
      debug: options.includes('--debug'),
    });
    process.exitCode = exitCode;
    process.stderr.write(text);
  }
}

await main();
