/**
 * mkfs.erofs, which makes an EROFS image of a tar stream and does the compressing: what the installed one can do, the options it
 * is given, and running it.
 *
 * The options are those of containerd's own converter (containerd, internal/erofsutils/mount.go, ConvertTarErofs), with a fixed
 * build time, so that the same layer gives the same bytes.
 */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import process from 'node:process';
import type { Writable } from 'node:stream';
import { execa } from 'execa';
import { Failure, UsageError } from '../failure.js';

export interface Mkfs {
  readonly program: string;
  /** `1.9`; what is made may depend on it. */
  readonly version: string;
}

/** Where to get one that can do it. */
const ADVICE =
  'install erofs-utils 1.8 or later (Debian 13 has it, Debian 12 has 1.5), or name another mkfs.erofs with --mkfs';

/** What is needed of it, and since which version of erofs-utils it is there. */
const NEEDED = [
  { option: '--tar=', does: 'reads no tars (--tar)', since: '1.7' },
  { option: '--aufs', does: 'makes no overlayfs whiteouts of those of images (--aufs)', since: '1.7' },
  {
    option: '--mkfs-time',
    does: 'cannot leave its own time out of what it makes (--mkfs-time)',
    since: '1.8',
  },
] as const;

/**
 * Asks mkfs.erofs what it can do.
 *
 * @throws {Failure} it is not there, or too old: what it lacks, and since which version that is there
 */
export async function findMkfs(program: string): Promise<Mkfs> {
  const ask = async (...options: string[]): Promise<string> => {
    const { stdout, stderr, code, failed } = await execa(program, options, {
      reject: false,
      stdin: 'ignore',
    });
    if (failed && code === 'ENOENT') throw new Failure(`${program} is not installed: ${ADVICE}`);
    if (failed && code !== undefined) throw new Failure(`${program} cannot be run (${code}): ${ADVICE}`);
    return `${stdout}\n${stderr}`;
  };
  const help = await ask('--help');
  const version =
    /mkfs\.erofs\b[^\n]*?(\d+\.\d+[\w.~+-]*)/.exec(await ask('-V'))?.[1] ?? 'of unknown version';
  const lacking = NEEDED.find(({ option }) => !help.includes(option));
  if (lacking === undefined) return { program, version };
  throw new Failure(
    `${program} ${version} ${lacking.does}, which is there since erofs-utils ${lacking.since}: ${ADVICE}`,
  );
}

/** Options that would make something else of the layer than a native EROFS layer in one file. */
const OURS = [
  '--tar',
  '--oci',
  '--s3',
  '--aufs',
  '--ovlfs-strip',
  '--blobdev',
  '--clean',
  '--gzinfo',
  '--help',
  '--incremental',
  '--offset',
  '--ungzip',
  '--unxz',
  '--version',
  '--vmdk-desc',
];

/** @throws {UsageError} naming an option that may not be given */
export function checkMkfsOptions(options: readonly string[]): void {
  const [first] = options;
  if (first !== undefined && !first.startsWith('-')) {
    throw new UsageError(`${JSON.stringify(first)}: one source and one destination are converted at a time`);
  }
  for (const option of options) {
    const name = option.split('=', 1)[0] ?? '';
    // getopt takes the beginning of a long name for the whole.
    const ours = name.length > 3 ? OURS.find((long) => long.startsWith(name)) : undefined;
    if (ours !== undefined || /^-[hV]/.test(option)) {
      throw new UsageError(
        `${JSON.stringify(option)} is not passed on to mkfs.erofs: what it is for is set here`,
      );
    }
  }
}

/**
 * All options but the names of files.
 *
 * @param compress as mkfs.erofs's -z takes it; undefined for none
 * @param further what the user wants beside; of what is given twice, mkfs.erofs takes the last
 */
export function mkfsOptions(compress: string | undefined, further: readonly string[]): string[] {
  const given = (prefix: string): boolean => further.some((option) => option.startsWith(prefix));
  const options = ['--tar=f', '--aufs', '--quiet', '-Enoinline_data', '-T0', '--mkfs-time'];
  // Images of this block size can be mounted on machines of any page size.
  if (!given('-b')) options.push('-b4096');
  if (compress !== undefined && !given('-z')) {
    options.push(`-z${compress}`);
    // Without it, 4 KiB are compressed at a time.
    if (!given('-C')) options.push('-C65536');
  }
  return [...options, ...further];
}

/** RFC 4122's name space of URLs. */
const NAME_SPACE_URL = Buffer.from('6ba7b8119dad11d180b400c04fd430c8', 'hex');

/** The UUID of a layer's image: containerd's, made of what the layer unpacks to. */
export function layerUuid(diffId: string): string {
  const hash = createHash('sha1')
    .update(NAME_SPACE_URL)
    .update(`erofs:blobs/${diffId}`)
    .digest()
    .subarray(0, 16);
  // Version 5, variant 1 (RFC 4122 §4.3).
  hash[6] = ((hash[6] ?? 0) & 0x0f) | 0x50;
  hash[8] = ((hash[8] ?? 0) & 0x3f) | 0x80;
  return hash.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
}

/** The last of what it said is what it failed of. */
const SAID_MAX = 4096;

/**
 * Makes an image of a tar. All of the tar is read, also what mkfs.erofs does not care for, so that who gives it can compare
 * digests.
 *
 * @param temporary a directory for file data on the way
 * @throws whatever `tar` throws; {Failure} what mkfs.erofs said; the reason of `signal`. What has been written of `out` is the
 *   caller's to remove
 */
export async function runMkfs(
  { program }: Mkfs,
  options: readonly string[],
  tar: AsyncIterable<Buffer>,
  { out, temporary, signal }: { out: string; temporary: string; signal: AbortSignal },
): Promise<void> {
  signal.throwIfAborted();
  const child = spawn(program, [...options, out], {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { ...process.env, TMPDIR: temporary },
  });
  const end = (): void => {
    child.kill('SIGKILL');
    // What it may have started itself is not waited for.
    child.stdout.destroy();
    child.stderr.destroy();
  };
  signal.addEventListener('abort', end, { once: true });
  let said = '';
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding('utf8').on('data', (text: string) => (said = (said + text).slice(-SAID_MAX)));
  const ended = once(child, 'close') as Promise<[number | null, NodeJS.Signals | null]>;
  // Looked at below, in whichever order things happen.
  ended.catch(() => undefined);
  try {
    await feed(child.stdin, tar, () => child.exitCode !== null && child.exitCode !== 0);
    const [code, killedBy] = await ended;
    signal.throwIfAborted();
    if (code === 0) return;
    const line = said
      .split('\n')
      .map((text) => text.replace(/^<[A-Z]> (?:erofs: )?/, '').trim())
      .filter((text) => text !== '' && !text.startsWith('mkfs.erofs '))
      .slice(-3)
      .join('; ');
    const how = killedBy === null ? `ended with ${code ?? 'no code'}` : `was ended by ${killedBy}`;
    throw new Failure(`mkfs.erofs ${how}${line === '' ? '' : `: ${line}`}`);
  } finally {
    signal.removeEventListener('abort', end);
    end();
    await ended.catch(() => undefined);
  }
}

/** @param failed whether there is no use in going on */
async function feed(stdin: Writable, tar: AsyncIterable<Buffer>, failed: () => boolean): Promise<void> {
  let open = true;
  // It may end before all of the tar is written: how it ended says whether that is in order.
  const close = (): void => void (open = false);
  stdin.on('error', close).on('close', close);
  const isOpen = (): boolean => open;
  for await (const piece of tar) {
    if (isOpen() && !stdin.write(piece)) {
      await new Promise<void>((resolve) => {
        const go = (): void => {
          stdin.off('drain', go).off('close', go).off('error', go);
          resolve();
        };
        stdin.on('drain', go).on('close', go).on('error', go);
        if (!isOpen()) go();
      });
    }
    if (failed()) return;
  }
  stdin.end();
}
