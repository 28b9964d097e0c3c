/** What threads declare of native code, all of it at once; otherwise it is declared where it is first used. */
import { nativeSha256 } from './sha256.js';
import { nativeZlib } from './zlib.js';

/**
 * Declares the functions of zlib and OpenSSL for this thread. To be called by a thread that may be ended from outside (end-thread.ts)
 * before it says anything. Where something cannot be had, its user says so.
 */
export function declareNativeFunctions(): void {
  nativeZlib();
  nativeSha256();
}
