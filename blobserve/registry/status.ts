/**
 * What the HTTP status of a registry's answer means for the caller and the user.
 */
import type { RegistryFailure } from './registry-error.js';

/** The kind of failure that a status is; for any status that is no success. */
export function failureOf(status: number): RegistryFailure {
  if (status === 401 || status === 403 || status === 451) return 'denied';
  if (status === 404 || status === 410) return 'missing';
  if (status === 408 || status === 425 || status === 429 || status >= 500) return 'transient';
  return 'invalid';
}

/**
 * What the user can do, or an empty string.
 *
 * @param authorized whether credentials or a token were sent
 * @param wait milliseconds the registry asked to wait
 */
export function adviceFor(
  status: number,
  host: string,
  authorized: boolean,
  wait: number | undefined,
): string {
  switch (status) {
    case 401:
      return authorized
        ? `check the credentials for ${host}`
        : `log in to ${host}: no credentials for it were used`;
    case 403:
      return authorized
        ? `the account used for ${host} has no right to pull this`
        : `log in to ${host} with an account that may pull this`;
    case 404:
      return 'check the name; some registries answer so too when the account has no right to pull';
    case 429:
      return `too many requests${wait === undefined ? '' : `, asked to wait ${wait} ms`}; logging in may raise the limit`;
    default:
      return '';
  }
}
