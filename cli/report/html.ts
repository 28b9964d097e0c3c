/**
 * HTML from templates: what is put in is escaped, unless it is HTML already. Names of files may be anything.
 */
import { printable } from '../quantities.js';

export class Html {
  constructor(readonly text: string) {}
}

type Part = Html | string | number | readonly Html[];

const ENTITIES: Readonly<Record<string, string>> = {
  '&': '&amp;',
  '<': '&lt;',
  '>': '&gt;',
  '"': '&quot;',
  "'": '&#39;',
};

function escape(text: string): string {
  return printable(text, 4096).replace(/[&<>"']/g, (character) => ENTITIES[character] ?? '');
}

/** A template with its values put in; a list is joined. */
export function html(strings: TemplateStringsArray, ...parts: readonly Part[]): Html {
  const texts = parts.map((part) => {
    if (part instanceof Html) return part.text;
    if (typeof part === 'number') return String(Math.round(part * 100) / 100);
    if (typeof part === 'string') return escape(part);
    return part.map(({ text }) => text).join('');
  });
  return new Html(String.raw({ raw: strings }, ...texts));
}
