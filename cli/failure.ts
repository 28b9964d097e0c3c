/**
 * How a command ends badly, and what is said then: one line that names the object and what to do; with `--json` the same
 * as JSON. A stack trace only with `--debug`.
 *
 * Exit codes: 0 done, 1 it failed, 2 wrong usage, 130 and 143 interrupted (SIGINT, SIGTERM), 141 nobody reads what is
 * printed.
 */
import { CommanderError, type Command } from 'commander';

export const EXIT = {
  done: 0,
  failed: 1,
  usage: 2,
  interrupted: 130,
  terminated: 143,
  brokenPipe: 141,
} as const;

/** Something that did not work; its message is for people and complete without the stack. */
export class Failure extends Error {
  override readonly name = 'Failure';

  constructor(
    message: string,
    readonly exitCode: number = EXIT.failed,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }
}

/** The command was called wrongly, in a way that commander cannot see. */
export class UsageError extends Failure {
  constructor(message: string) {
    super(message, EXIT.usage);
  }
}

export interface FailureReport {
  readonly exitCode: number;
  /** For standard error, with its newline; empty when nothing is to be said. */
  readonly text: string;
}

/** One line: what is printed may come from a registry, and is bounded. */
function oneLine(text: string): string {
  return text
    .replace(/[\p{Cc}\p{Zl}\p{Zp}]+/gu, ' ')
    .trim()
    .slice(0, 2000);
}

function messageOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  // AggregateError of a connection that was tried over IPv4 and IPv6 has an empty message.
  const { code } = error as NodeJS.ErrnoException;
  return error.message === '' ? (code ?? error.name) : error.message;
}

function usageOf(command: Command): string {
  const names: string[] = [];
  for (let at: Command | null = command; at !== null; at = at.parent) names.unshift(at.name());
  return `${names.join(' ')} ${command.usage()}`;
}

/**
 * @param command the command that was called, as far as it is known
 * @param form how the caller wants to hear of it
 */
export function describeFailure(
  error: unknown,
  command: Command,
  form: { readonly json: boolean; readonly debug: boolean },
): FailureReport {
  // Help and version: commander has printed them.
  if (error instanceof CommanderError && error.exitCode === 0) return { exitCode: 0, text: '' };
  const usage = error instanceof CommanderError || error instanceof UsageError;
  const exitCode = usage ? EXIT.usage : error instanceof Failure ? error.exitCode : EXIT.failed;
  const message = oneLine(messageOf(error).replace(/^error: /, ''));
  const stack = form.debug && error instanceof Error ? `${error.stack ?? ''}\n` : '';
  if (form.json) {
    const document = { error: message, exit: exitCode, ...(usage ? { usage: usageOf(command) } : {}) };
    return { exitCode, text: `${stack}${JSON.stringify(document)}\n` };
  }
  const name = command.parent === null ? command.name() : `${command.parent.name()} ${command.name()}`;
  const said = message === '' || message === '(outputHelp)' ? 'a command is missing' : message;
  const hint = usage ? `usage: ${usageOf(command)}\n` : '';
  return { exitCode, text: `${stack}${name}: ${said}\n${hint}` };
}
