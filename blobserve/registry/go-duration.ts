/**
 * Durations as Go programs write them (Go's time.ParseDuration): `300ms`, `1.5h`, `2h45m0s`.
 */

const UNITS: Readonly<Record<string, number>> = {
  ns: 1e-6,
  us: 1e-3,
  µs: 1e-3,
  μs: 1e-3,
  ms: 1,
  s: 1000,
  m: 60_000,
  h: 3_600_000,
};

/**
 * Milliseconds of a duration.
 *
 * @throws {RangeError} when the text is no duration, or a negative one
 */
export function parseGoDuration(text: string): number {
  if (text === '0') return 0;
  if (!/^(?:\d{1,9}(?:\.\d{0,9})?(?:ns|us|µs|μs|ms|s|m|h))+$/.test(text)) {
    throw new RangeError(
      `${JSON.stringify(text.slice(0, 50))} is no duration; expected something like "30s" or "1h30m"`,
    );
  }
  let total = 0;
  for (const [, number, unit] of text.matchAll(/([\d.]+)([a-zµμ]+)/g)) {
    total += Number(number) * (UNITS[unit ?? ''] ?? 0);
  }
  return total;
}
