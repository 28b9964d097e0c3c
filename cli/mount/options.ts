/**
 * The words after `-o`: those of `mount.erofs -t erofs.nbd`, and what goes with them. Pure.
 *
 * Source of the names: erofs-utils, mount/main.c, erofsmount_parse_oci_option and erofsmount_parse_flagopts. What it takes
 * and forgets, or hands to the kernel unseen, is refused here with the option's name.
 */
import {
  MS_NOATIME,
  MS_NODEV,
  MS_NODIRATIME,
  MS_NOEXEC,
  MS_NOSUID,
  MS_RDONLY,
  MS_RELATIME,
} from '../../blobserve/linux/mount.js';
import { type Platform, parsePlatform } from '../../blobserve/registry/platform.js';
import { UsageError } from '../failure.js';

export interface MountOptions {
  /** Digest of the one layer that is meant, `sha256:<hex>`. */
  readonly blob?: string;
  /** Its number in the image, from 0, the lowest first. */
  readonly layer?: number;
  readonly platform?: Platform;
  readonly username?: string;
  readonly password?: string;
  /** Whose first line is the password. */
  readonly passwordFile?: string;
  readonly tarindex?: string;
  readonly zinfo?: string;
  /** The registry may be spoken to without TLS. */
  readonly insecure: boolean;
  /** Of mount(2). */
  readonly flags: number;
}

/** Flags by name; null: says what is the case anyway. */
const FLAGS: Readonly<Record<string, { readonly set?: number; readonly clear?: number } | null>> = {
  defaults: null,
  quiet: null,
  loud: null,
  user: null,
  nouser: null,
  ro: null,
  async: null,
  sync: null,
  nosuid: { set: MS_NOSUID },
  suid: { clear: MS_NOSUID },
  nodev: { set: MS_NODEV },
  dev: { clear: MS_NODEV },
  noexec: { set: MS_NOEXEC },
  exec: { clear: MS_NOEXEC },
  noatime: { set: MS_NOATIME },
  atime: { clear: MS_NOATIME },
  relatime: { set: MS_RELATIME },
  norelatime: { clear: MS_RELATIME },
  nodiratime: { set: MS_NODIRATIME },
  diratime: { clear: MS_NODIRATIME },
};

const NEED_VALUE = [
  'oci.blob',
  'oci.layer',
  'oci.platform',
  'oci.username',
  'oci.password',
  'oci.password_file',
  'oci.tarindex',
  'oci.zinfo',
] as const;
type ValueName = (typeof NEED_VALUE)[number];

/**
 * @param texts of each `-o`, in order: options with commas between
 * @throws {UsageError} naming the option that does not parse, is given twice or contradicts another
 */
export function parseMountOptions(texts: readonly string[]): MountOptions {
  const values = new Map<ValueName, string>();
  let insecure = false;
  let flags = MS_RDONLY;
  for (const option of texts.flatMap((text) => text.split(',')).filter((one) => one !== '')) {
    const equals = option.indexOf('=');
    const name = equals < 0 ? option : option.slice(0, equals);
    const value = equals < 0 ? undefined : option.slice(equals + 1);
    if (isValueName(name)) {
      if (value === undefined || value === '') throw new UsageError(`-o ${name}: a value is missing`);
      if (values.has(name)) throw new UsageError(`-o ${name}: given twice`);
      values.set(name, value);
    } else if (name === 'oci.insecure') {
      if (value !== undefined) throw new UsageError('-o oci.insecure: takes no value');
      insecure = true;
    } else {
      flags = withFlag(flags, name, value);
    }
  }
  refuseContradictions(values);
  return { ...read(values), insecure, flags };
}

function isValueName(name: string): name is ValueName {
  return (NEED_VALUE as readonly string[]).includes(name);
}

function withFlag(flags: number, name: string, value: string | undefined): number {
  if (name === 'rw') throw new UsageError('-o rw: what is mounted is a read-only file system');
  if (name === 'remount' || name === 'move' || name === 'loop') {
    throw new UsageError(`-o ${name}: not with a mount of this kind; umount it and mount it again`);
  }
  const change = Object.hasOwn(FLAGS, name) ? FLAGS[name] : undefined;
  if (change === undefined) throw new UsageError(`-o ${name}: no such option`);
  if (value !== undefined) throw new UsageError(`-o ${name}: takes no value`);
  return (flags | (change?.set ?? 0)) & ~(change?.clear ?? 0);
}

function refuseContradictions(values: ReadonlyMap<ValueName, string>): void {
  const notBoth = (one: ValueName, other: ValueName): void => {
    if (values.has(one) && values.has(other)) {
      throw new UsageError(`-o ${other}: cannot be given together with ${one}`);
    }
  };
  const needs = (one: ValueName, ...others: readonly ValueName[]): void => {
    if (values.has(one) && !others.some((other) => values.has(other))) {
      throw new UsageError(`-o ${one}: needs ${others.join(' or ')} too`);
    }
  };
  notBoth('oci.blob', 'oci.layer');
  notBoth('oci.password', 'oci.password_file');
  needs('oci.username', 'oci.password', 'oci.password_file');
  needs('oci.password', 'oci.username');
  needs('oci.password_file', 'oci.username');
  needs('oci.zinfo', 'oci.tarindex');
}

function read(values: ReadonlyMap<ValueName, string>): Omit<MountOptions, 'insecure' | 'flags'> {
  const [blob, layer, platform] = [
    values.get('oci.blob'),
    values.get('oci.layer'),
    values.get('oci.platform'),
  ];
  const text = {
    username: values.get('oci.username'),
    password: values.get('oci.password'),
    passwordFile: values.get('oci.password_file'),
    tarindex: values.get('oci.tarindex'),
    zinfo: values.get('oci.zinfo'),
  };
  return {
    ...(blob !== undefined && { blob: toDigest(blob) }),
    ...(layer !== undefined && { layer: toNumber(layer) }),
    ...(platform !== undefined && { platform: toPlatform(platform) }),
    ...Object.fromEntries(Object.entries(text).filter(([, value]) => value !== undefined)),
  };
}

function toDigest(text: string): string {
  // As mount.erofs does: the algorithm may be left out.
  const digest = text.includes(':') ? text : `sha256:${text}`;
  if (/^sha256:[0-9a-f]{64}$/.test(digest)) return digest;
  throw new UsageError(
    `-o oci.blob=${text}: expected sha256: and 64 lower-case hexadecimal digits, of a layer's blob`,
  );
}

function toNumber(text: string): number {
  if (/^\d{1,4}$/.test(text)) return Number(text);
  throw new UsageError(`-o oci.layer=${text}: expected the number of a layer, from 0 for the lowest`);
}

function toPlatform(text: string): Platform {
  try {
    return parsePlatform(text);
  } catch (error) {
    throw new UsageError(`-o oci.platform=${text}: ${(error as Error).message}`);
  }
}
