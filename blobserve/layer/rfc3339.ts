/** Times as Go writes them in JSON and flatbuffers: RFC 3339 with up to nine digits behind the second. */

/** Years 0 to 9999, which is what RFC 3339 can say. */
const TIME = /^(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)$/;

/**
 * Seconds since 1970 rounded down, may be negative, and nanoseconds 0..999999999 above them.
 *
 * @returns undefined when it is no such time
 */
export function parseRfc3339(text: string): { seconds: number; nanoseconds: number } | undefined {
  const match = TIME.exec(text);
  if (match === null) return undefined;
  const [year, month, day, hour, minute, second] = match.slice(1, 7).map(Number) as [
    number,
    number,
    number,
    number,
    number,
    number,
  ];
  const zone = match[8] ?? 'Z';
  const date = new Date(0);
  // Not Date.UTC, which takes the years 0 to 99 for 1900 to 1999.
  date.setUTCFullYear(year, month - 1, day);
  date.setUTCHours(hour, minute, second);
  const offsetMinutes =
    zone === 'Z'
      ? 0
      : (zone.startsWith('-') ? -1 : 1) * (Number(zone.slice(1, 3)) * 60 + Number(zone.slice(4)));
  return {
    seconds: date.getTime() / 1000 - offsetMinutes * 60,
    nanoseconds: Number((match[7] ?? '').padEnd(9, '0')),
  };
}
