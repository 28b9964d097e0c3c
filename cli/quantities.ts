/**
 * Sizes, times and shares as people read them.
 */
const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];

/** @returns `0 B`, `512 B`, `1.5 MiB`, `120 GiB`: three digits at least where there are so many */
export function formatSize(bytes: number): string {
  let value = bytes;
  let unit = 0;
  // 1023.96 KiB would be rounded to "1024 KiB".
  while (value >= 1023.95 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  const digits = unit === 0 || value >= 100 ? 0 : 1;
  return `${value.toFixed(digits)} ${UNITS[unit] ?? ''}`;
}

/** @returns `0 ms`, `12 ms`, `1.5 s`, `59 s`, `3 min`, `2 h`, `5 d` */
export function formatDuration(ms: number): string {
  if (ms < 999.5) return `${Math.round(ms)} ms`;
  if (ms < 9_950) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 120_000) return `${Math.round(ms / 1000)} s`;
  if (ms < 7_200_000) return `${Math.round(ms / 60_000)} min`;
  if (ms < 172_800_000) return `${Math.round(ms / 3_600_000)} h`;
  return `${Math.round(ms / 86_400_000)} d`;
}

/**
 * @returns `34 %`; "100 %" only for all of it, "0 %" only for nothing
 * @param share from 0 to 1; undefined: of nothing
 */
export function formatShare(share: number | undefined): string {
  if (share === undefined) return '-';
  if (share > 0 && share < 0.01) return '<1 %';
  return `${share >= 1 ? 100 : Math.min(99, Math.round(share * 100))} %`;
}

/** Whatever came from a registry or a label, made harmless for a terminal: one line, without control characters. */
export function printable(text: string, maxLength = 200): string {
  const clean = text.replace(/\p{C}|\p{Zl}|\p{Zp}/gu, '�');
  return clean.length > maxLength ? `${clean.slice(0, maxLength - 1)}…` : clean;
}
