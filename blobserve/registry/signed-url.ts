/**
 * How long an address that a registry redirected to may be used.
 *
 * Storage services and content networks sign such addresses and write into the query when the signature ends:
 * Amazon S3 and what speaks like it (`X-Amz-Date` + `X-Amz-Expires`), Google (`X-Goog-…`, the same way; or `Expires`),
 * CloudFront and S3's older signatures (`Expires`, seconds since 1970; or a `Policy`), Azure (`se`, an ISO date).
 */
import { isRecord, parseJson } from './registry-error.js';

/** A query that we cannot read is taken to be a signature that ends soon. */
const UNKNOWN_LIFE = 60_000;
/** An address without a query is a place; it is looked up again at times, for places move. */
const PLAIN_LIFE = 600_000;
const MAX_LIFE = 86_400_000;
/** Requests take time and clocks differ: left off the end, at most a tenth of the life. */
const MARGIN = 10_000;

/**
 * Until when the address is used, in milliseconds since the epoch; not later than a day from now.
 *
 * @param now milliseconds since the epoch
 */
export function usableUntil(url: URL, now: number): number {
  if (url.search === '') return now + PLAIN_LIFE;
  const end = signatureEnd(url);
  if (end === undefined) return now + UNKNOWN_LIFE;
  const life = Math.min(Math.max(end - now, 0), MAX_LIFE);
  return now + life - Math.min(life / 10, MARGIN);
}

function signatureEnd(url: URL): number | undefined {
  const query = new Map([...url.searchParams].map(([name, value]) => [name.toLowerCase(), value]));
  for (const vendor of ['x-amz', 'x-goog']) {
    const signed = parseBasicDate(query.get(`${vendor}-date`));
    const life = parseSeconds(query.get(`${vendor}-expires`));
    if (signed !== undefined && life !== undefined) return signed + life;
  }
  const azure = query.get('se');
  if (azure !== undefined && /^\d{4}-\d\d-\d\d(T[\d:.]+Z?)?$/.test(azure)) {
    const end = Date.parse(azure.includes('T') && !azure.endsWith('Z') ? `${azure}Z` : azure);
    if (!Number.isNaN(end)) return end;
  }
  return parseSeconds(query.get('expires')) ?? policyEnd(query.get('policy'));
}

/** `20260131T235959Z`, ISO 8601's basic format. */
function parseBasicDate(text: string | undefined): number | undefined {
  const match = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z$/.exec(text ?? '');
  if (!match) return undefined;
  const [year = 0, month = 0, day = 0, hour = 0, minute = 0, second = 0] = match.slice(1).map(Number);
  return Date.UTC(year, month - 1, day, hour, minute, second);
}

function parseSeconds(text: string | undefined): number | undefined {
  return text !== undefined && /^\d{1,12}$/.test(text) ? Number(text) * 1000 : undefined;
}

/** CloudFront's custom policy: JSON in base64 with "-", "_" and "~" for "+", "=" and "/". */
function policyEnd(text: string | undefined): number | undefined {
  if (text === undefined || text.length > 4096) return undefined;
  const base64 = text.replaceAll('-', '+').replaceAll('_', '=').replaceAll('~', '/');
  const policy = parseJson(Buffer.from(base64, 'base64').toString('utf8'));
  const end = /"DateLessThan":\{"AWS:EpochTime":(\d{1,12})\}/.exec(
    isRecord(policy) ? JSON.stringify(policy) : '',
  );
  return end ? Number(end[1]) * 1000 : undefined;
}
