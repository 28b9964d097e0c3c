/**
 * The shell commands of README.md and docs, as they stand there: blocks of `sh`, a command on each line; and of `console`,
 * where `$ ` begins a command and what it prints follows, with `…` for what is another thing every time.
 */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { checkout } from '../debian/packages.js';

export interface DocumentedCommand {
  /** `docs/mount.md` */
  readonly page: string;
  readonly command: string;
  /** What it prints by the page; undefined: the page does not say. */
  readonly prints: string | undefined;
}

const BLOCK = /^( *)```(sh|bash|shell|console)\n([\s\S]*?)^ *```$/gm;

/** Of all pages, each in its own order. */
export async function documentedCommands(): Promise<DocumentedCommand[]> {
  const docs = await readdir(path.join(checkout, 'docs'), { recursive: true });
  const pages = ['README.md', ...docs.filter((name) => name.endsWith('.md')).map((name) => `docs/${name}`)];
  const found: DocumentedCommand[] = [];
  for (const page of pages.sort()) {
    const text = await readFile(path.join(checkout, page), 'utf8');
    for (const [, indent = '', language, block = ''] of text.matchAll(BLOCK)) {
      const lines = block
        .split('\n')
        .slice(0, -1)
        .map((line) => line.slice(indent.length));
      found.push(...(language === 'console' ? ofConsole(page, lines) : ofShell(page, lines)));
    }
  }
  return found;
}

function ofShell(page: string, lines: readonly string[]): DocumentedCommand[] {
  return lines
    .map((line) => line.replace(/\s+# .*$/, '').trim())
    .filter((line) => line !== '' && !line.startsWith('#'))
    .map((command) => ({ page, command, prints: undefined }));
}

function ofConsole(page: string, lines: readonly string[]): DocumentedCommand[] {
  const found: { page: string; command: string; prints: string }[] = [];
  for (const line of lines) {
    if (/^[$#] /.test(line)) found.push({ page, command: line.slice(2), prints: '' });
    else if (found.length > 0) (found.at(-1) ?? { prints: '' }).prints += `${line}\n`;
  }
  return found;
}

/** Whether something was printed as a page shows it: line by line, and `…` for anything within one, or for whole lines alone. */
export function isAsShown(shown: string, printed: string): boolean {
  const pattern = shown
    .trimEnd()
    .split('\n')
    .map((line) =>
      line.trim() === '…'
        ? '(?:.*\\n)*?'
        : `${line
            .trim()
            .split(/\s*…\s*|\s+/)
            .map(escaped)
            .join('.*?')}.*\\n`,
    )
    .join('');
  return new RegExp(`^${pattern}$`).test(`${printed.trimEnd()}\n`);
}

function escaped(text: string): string {
  return text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
}
