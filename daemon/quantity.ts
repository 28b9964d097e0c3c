/**
 * Sizes and times as people write them in a configuration file: "256KiB", "4MiB", "1.5GiB", "250ms", "30s", "10m", "30d".
 */
const SIZE_UNITS: Readonly<Record<string, number>> = {
  B: 1,
  KiB: 2 ** 10,
  MiB: 2 ** 20,
  GiB: 2 ** 30,
  TiB: 2 ** 40,
  kB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
};

const TIME_UNITS: Readonly<Record<string, number>> = { ms: 1, s: 1e3, m: 60e3, h: 3600e3, d: 86400e3 };

function parseQuantity(text: string, units: Readonly<Record<string, number>>, example: string): number {
  const match = /^(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]+)$/.exec(text.trim());
  const unit = match?.[2] === undefined ? undefined : units[match[2]];
  if (match?.[1] === undefined || unit === undefined) {
    throw new RangeError(
      `expected a number with one of the units ${Object.keys(units).join(', ')}, such as "${example}"`,
    );
  }
  const value = Math.round(Number(match[1]) * unit);
  if (!Number.isSafeInteger(value)) throw new RangeError('the number is too large');
  return value;
}

/**
 * @returns bytes
 * @throws {RangeError} saying what was expected
 */
export function parseSize(text: string): number {
  return parseQuantity(text, SIZE_UNITS, '256KiB');
}

/**
 * @returns milliseconds
 * @throws {RangeError} saying what was expected
 */
export function parseDuration(text: string): number {
  return parseQuantity(text, TIME_UNITS, '30s');
}
