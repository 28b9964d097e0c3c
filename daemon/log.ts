/**
 * Structured logs: one JSON object per line, or readable lines when standard error is a terminal.
 */
import { createRequire } from 'node:module';
import { pino, type Logger } from 'pino';
import type { PinoPretty } from 'pino-pretty';

export type { Logger } from 'pino';

/** Levels that `--log-level` and `log.level` take, from quiet to talkative. */
export const LOG_LEVELS = ['error', 'warn', 'info', 'debug', 'trace'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

/**
 * Header and option names whose values never reach a log, wherever an object that holds them is logged.
 */
const SECRETS = [
  'password',
  'token',
  'authorization',
  'identitytoken',
  'secret',
  'access_token',
  'refresh_token',
];

/**
 * @param name the process: `snapshotter`, `blobserve`, …
 * @param format `auto` is readable on a terminal and JSON otherwise
 */
export function createLogger(
  name: string,
  level: LogLevel,
  format: 'auto' | 'json' | 'text' = 'auto',
): Logger {
  const readable = format === 'text' || (format === 'auto' && process.stderr.isTTY);
  const options = {
    name,
    level,
    redact: { paths: SECRETS.flatMap((key) => [key, `*.${key}`, `*.*.${key}`]), censor: '[redacted]' },
  };
  const destination = readable
    ? loadPretty()({ destination: 2, sync: true, ignore: 'pid,hostname', translateTime: 'SYS:HH:MM:ss.l' })
    : pino.destination({ dest: 2, sync: true });
  return pino(options, destination);
}

/** Loaded only where somebody looks on: a daemon that writes JSON saves its memory. */
function loadPretty(): typeof PinoPretty {
  return createRequire(import.meta.url)('pino-pretty') as typeof PinoPretty;
}

/** A logger that says nothing, for tests and for readers used outside a daemon. */
export const silentLogger: Logger = pino({ level: 'silent' });
