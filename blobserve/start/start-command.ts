/**
 * What a container of an image runs when nobody says otherwise, by the image's configuration; and what programs that begin
 * others would begin, as far as that can be seen without running them.
 */
import path from 'node:path';
import { z } from 'zod';

/** Names are as the configuration has them, in UTF-8. */
export interface StartCommand {
  /** Entrypoint and Cmd. */
  readonly words: readonly string[];
  /** Cmd alone: what an entrypoint that is a script mostly runs in the end. */
  readonly command: readonly string[];
  /** Directories, in order. */
  readonly searchPath: readonly string[];
  readonly libraryPath: readonly string[];
  /** Begins with a slash. */
  readonly workingDirectory: string;
}

/** What the OCI runtime takes when the image does not say. */
const SEARCH_PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin';
const WORDS_MAX = 64;
const WORD_MAX = 4096;
const VARIABLES_MAX = 1024;

const words = z
  .array(z.string())
  .nullish()
  .transform((list) => list ?? []);
const configuration = z.object({
  config: z.object({ Entrypoint: words, Cmd: words, Env: words, WorkingDir: z.string().nullish() }).nullish(),
});

/** @param body an image configuration (OCI image-spec, config.md) @returns undefined when it does not say what to run */
export function startCommand(body: unknown): StartCommand | undefined {
  const config = configuration.safeParse(body).data?.config;
  if (!config) return undefined;
  const usable = (list: readonly string[]): string[] =>
    list.slice(0, WORDS_MAX).map((word) => word.slice(0, WORD_MAX));
  const [entrypoint, command] = [usable(config.Entrypoint), usable(config.Cmd)];
  const all = [...entrypoint, ...command];
  if (all.length === 0) return undefined;
  const variable = (name: string): string | undefined =>
    config.Env.slice(0, VARIABLES_MAX)
      .findLast((text) => text.startsWith(`${name}=`))
      ?.slice(name.length + 1, name.length + 1 + WORD_MAX);
  const directories = (list: string): string[] =>
    list
      .split(':')
      .filter((directory) => directory.startsWith('/'))
      .slice(0, WORDS_MAX);
  return {
    words: all,
    command: entrypoint.length > 0 ? command : [],
    searchPath: directories(variable('PATH') ?? SEARCH_PATH),
    libraryPath: directories(variable('LD_LIBRARY_PATH') ?? ''),
    workingDirectory: path.posix.join('/', config.WorkingDir ?? ''),
  };
}

const SHELLS = new Set(['sh', 'bash', 'dash', 'ash', 'zsh']);
/** Programs whose first argument that is no option, after any VARIABLE=value, is the next program. */
const WRAPPERS = new Set(['env', 'tini', 'tini-static', 'dumb-init', 'catatonit', 'exec', 'nice', 'nohup']);
const ASSIGNMENT = /^[A-Za-z_][A-Za-z0-9_]*=/;

/**
 * The words of the program that this one begins.
 *
 * @param program its name or path
 * @returns empty when it begins none, or that cannot be seen
 */
export function begunBy([program = '', ...parameters]: readonly string[]): readonly string[] {
  const name = path.posix.basename(program);
  if (SHELLS.has(name)) {
    const at = parameters.findIndex((word) => /^-[a-z]*c$/.test(word));
    return at < 0 ? [] : shellWords(parameters[at + 1] ?? '');
  }
  if (!WRAPPERS.has(name)) return [];
  // `env -S` has several words in one argument.
  const split = name === 'env' ? parameters.flatMap((word) => wordsOf(word.replace(/^-S/, ''))) : parameters;
  const at = split.findIndex((word) => !word.startsWith('-') && !ASSIGNMENT.test(word));
  return at < 0 ? [] : split.slice(at);
}

/** The first command of a line for a shell: what is before anything that only a shell understands. */
function shellWords(line: string): string[] {
  const [simple = ''] = line.trim().split(/[;&|<>()$`\n\\]/, 1);
  const all = wordsOf(simple).map((word) => word.replace(/^(['"])(.*)\1$/, '$2'));
  const at = all.findIndex((word) => word !== 'exec' && !ASSIGNMENT.test(word));
  return at < 0 || /['"*?[{~]/.test(all[at] ?? '') ? [] : all.slice(at, at + WORDS_MAX);
}

function wordsOf(text: string): string[] {
  return text.split(/\s+/).filter((word) => word !== '');
}

/** Longest first line of a script that the kernel reads (BINPRM_BUF_SIZE). */
export const SCRIPT_LINE_MAX = 256;

/**
 * The words of a script's interpreter, its parameter included.
 *
 * @param head the script's first bytes
 * @returns undefined when it is no script
 */
export function interpreterOf(head: Buffer): readonly string[] | undefined {
  if (head.toString('latin1', 0, 2) !== '#!') return undefined;
  const [line = ''] = head.toString('utf8', 2, SCRIPT_LINE_MAX).split(/[\n\0]/, 1);
  const [, interpreter, parameter] = /^[ \t]*(\S+)(?:[ \t]+(.*?))?[ \t]*$/.exec(line) ?? [];
  if (interpreter === undefined) return undefined;
  return parameter ? [interpreter, parameter] : [interpreter];
}
