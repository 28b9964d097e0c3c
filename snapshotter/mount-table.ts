/**
 * What is mounted, as the kernel says. Reading /proc/self/mountinfo touches no mounted file system, so it is safe also
 * when the process behind one of them is dead.
 *
 * Source of the format: Linux, Documentation/filesystems/proc.rst, section 3.5.
 */
import { readFile } from 'node:fs/promises';

export interface MountEntry {
  readonly id: number;
  /** "major:minor" of the file system. */
  readonly device: string;
  readonly mountPoint: string;
  /** File system type: `erofs`, `overlay`, `fuse`. */
  readonly type: string;
  readonly source: string;
  readonly superOptions: string;
}

/** The kernel writes space, tab, newline and backslash as octal escapes. */
function unescape(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(parseInt(digits, 8)));
}

/** Parses the text of a mountinfo file; lines that are not of its form are left out. */
export function parseMountInfo(text: string): MountEntry[] {
  const entries: MountEntry[] = [];
  for (const line of text.split('\n')) {
    const fields = line.split(' ');
    const separator = fields.indexOf('-', 6);
    if (separator < 0) continue;
    const [id, , device, , mountPoint] = fields;
    const [type, source, superOptions] = fields.slice(separator + 1);
    if (id === undefined || device === undefined || mountPoint === undefined || type === undefined) continue;
    entries.push({
      id: Number(id),
      device,
      mountPoint: unescape(mountPoint),
      type,
      source: unescape(source ?? ''),
      superOptions: superOptions ?? '',
    });
  }
  return entries;
}

/** The mounts of this process's namespace, in the order they were made. */
export async function mountTable(): Promise<MountEntry[]> {
  return parseMountInfo(await readFile('/proc/self/mountinfo', 'utf8'));
}

/** The mount on top at exactly this place, if any. */
export async function mountAt(mountPoint: string): Promise<MountEntry | undefined> {
  return (await mountTable()).findLast((entry) => entry.mountPoint === mountPoint);
}
