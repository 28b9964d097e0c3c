/**
 * Platforms, and the choice of one manifest from an index. Normalisation and order of preference are those of
 * containerd (its package `platforms`: `Normalize` and `Only`), so that we choose the manifest that it chooses.
 */

export interface Platform {
  readonly os: string;
  readonly architecture: string;
  readonly variant?: string | undefined;
}

/** The `platform` of an index entry. */
export interface DescribedPlatform extends Platform {
  readonly 'os.features'?: readonly string[] | undefined;
}

export interface PlatformChoice {
  /** Among entries for the same platform, prefer one whose os.features say `erofs`. */
  readonly preferErofs?: boolean;
}

/**
 * `os/architecture[/variant]` as a normalised platform.
 *
 * @throws {TypeError} when the text is not of that form
 */
export function parsePlatform(text: string): Platform {
  const match = /^([\w.-]{1,64})\/([\w.-]{1,64})(?:\/([\w.-]{1,64}))?$/.exec(text);
  if (match?.[1] === undefined || match[2] === undefined) {
    throw new TypeError(
      `platform ${JSON.stringify(text.slice(0, 200))}: expected os/architecture or os/architecture/variant, ` +
        'such as linux/amd64 or linux/arm/v7',
    );
  }
  return normalizePlatform({ os: match[1], architecture: match[2], variant: match[3] });
}

/** The platform of this machine's images. */
export function machinePlatform(architecture: string = process.arch): Platform {
  const names: Record<string, string> = { x64: 'amd64', ia32: '386', ppc64: 'ppc64le', mipsel: 'mipsle' };
  return normalizePlatform({ os: 'linux', architecture: names[architecture] ?? architecture });
}

export function formatPlatform({ os, architecture, variant }: Platform): string {
  return `${os}/${architecture}${variant === undefined || variant === '' ? '' : `/${variant}`}`;
}

/** One spelling for each platform: `x86_64` is amd64, `arm64/v8` is arm64, `arm` is arm/v7. */
export function normalizePlatform(platform: Platform): Platform {
  const os = platform.os.toLowerCase() === 'macos' ? 'darwin' : platform.os.toLowerCase();
  let architecture = platform.architecture.toLowerCase();
  let variant = platform.variant?.toLowerCase() ?? '';
  switch (architecture) {
    case 'i386':
      architecture = '386';
      variant = '';
      break;
    case 'x86_64':
    case 'x86-64':
    case 'amd64':
      architecture = 'amd64';
      if (variant === 'v1') variant = '';
      break;
    case 'aarch64':
    case 'arm64':
      architecture = 'arm64';
      if (variant === '8' || variant === 'v8') variant = '';
      break;
    case 'armhf':
      architecture = 'arm';
      variant = 'v7';
      break;
    case 'armel':
      architecture = 'arm';
      variant = 'v6';
      break;
    case 'arm':
      if (variant === '') variant = 'v7';
      else if (/^[5-8]$/.test(variant)) variant = `v${variant}`;
      break;
    default:
  }
  return { os, architecture, ...(variant === '' ? {} : { variant }) };
}

/**
 * The entry to use for a platform: of the best platform this one can run (itself, then lower variants, then the 32-bit
 * architecture), the first entry with the best os.features.
 *
 * Features are ranked: `erofs` alone when wanted, then none, then `erofs` when not wanted, then any we do not know.
 *
 * @returns undefined when no entry can run there
 */
export function choosePlatform<T extends { readonly platform?: DescribedPlatform | undefined }>(
  entries: readonly T[],
  wanted: Platform,
  choice: PlatformChoice = {},
): T | undefined {
  for (const candidate of runnable(normalizePlatform(wanted))) {
    const name = formatPlatform(candidate);
    const fitting = entries.filter(
      (entry) => entry.platform !== undefined && formatPlatform(normalizePlatform(entry.platform)) === name,
    );
    const rank = (entry: T) =>
      featureRank(entry.platform?.['os.features'] ?? [], choice.preferErofs === true);
    const best = Math.min(...fitting.map(rank));
    const chosen = fitting.find((entry) => rank(entry) === best);
    if (chosen) return chosen;
  }
  return undefined;
}

function featureRank(features: readonly string[], preferErofs: boolean): number {
  if (features.some((feature) => feature !== 'erofs')) return 3;
  if (features.length === 0) return 1;
  return preferErofs ? 0 : 2;
}

/** A platform and those whose programs it runs too, best first. */
function runnable(platform: Platform): Platform[] {
  const { os, architecture } = platform;
  const level = Number(/^v(\d{1,2})$/.exec(platform.variant ?? '')?.[1] ?? 0);
  const below = (lowest: number) =>
    Array.from({ length: Math.max(level - lowest, 0) }, (_, i) =>
      normalizePlatform({ os, architecture, variant: `v${level - 1 - i}` }),
    );
  switch (architecture) {
    case 'amd64':
      return [platform, ...below(1), { os, architecture: '386' }];
    case 'arm':
      return [platform, ...below(5)];
    case 'arm64':
      return [
        platform,
        ...below(8),
        ...[8, 7, 6, 5].map((number) => ({ os, architecture: 'arm', variant: `v${number}` })),
      ];
    default:
      return [platform];
  }
}
