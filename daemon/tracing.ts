/**
 * Spans of what the daemons do, for OpenTelemetry, when somebody wants them: `[tracing]` in the configuration, or the standard
 * variables OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_EXPORTER_OTLP_TRACES_ENDPOINT.
 *
 * The packages are loaded only then (some 8 MB of memory in each daemon), and need not be installed otherwise. While it is off,
 * `traced` calls the work it was given, and everything else is a comparison with `undefined`.
 */
import type * as Api from '@opentelemetry/api';
import type { Configuration } from './configuration.js';
import type { Logger } from './log.js';
import { VERSION } from './version.js';

type Value = string | number | boolean | readonly string[];
/** Names as in OpenTelemetry's semantic conventions; those of our own begin with `erofs_nbd.` */
export type SpanAttributes = Readonly<Record<string, Value>>;

/** A span under way. */
export interface TraceSpan {
  set(attributes: SpanAttributes): void;
}

export interface SpanOptions {
  readonly kind?: 'server' | 'client';
  readonly attributes?: SpanAttributes;
  /** Looks up what a caller has sent along, by the name of a header: the span is part of the caller's trace then. */
  readonly carrier?: (name: string) => string | undefined;
  /** What its end adds: without an error, or with the one that the work has failed with. */
  readonly outcome?: (error: unknown) => SpanAttributes;
  /** Whether an error is trouble, rather than an answer; default: it is. */
  readonly isTrouble?: (error: unknown) => boolean;
}

interface Active {
  readonly api: typeof Api;
  readonly tracer: Api.Tracer;
  readonly propagator: Api.TextMapPropagator;
  readonly close: () => Promise<void>;
}

/** Characters of an error's message that a span keeps. */
const MESSAGE_MAX = 500;
/** Milliseconds that the last spans may take on their way. */
const CLOSE_TIMEOUT = 2000;

const NO_SPAN: TraceSpan = { set: () => undefined };
const NO_HEADERS: Readonly<Record<string, string>> = {};

let active: Active | undefined;

/** Whether spans are wanted. */
export function isTracing(): boolean {
  return active !== undefined;
}

/**
 * Begins, when that is wanted. Nothing depends on it: what is in the way of it is logged.
 *
 * @param service its name for who looks at the traces
 */
export async function openTracing(
  service: string,
  { tracing }: Pick<Configuration, 'tracing'>,
  log: Logger,
  environment: NodeJS.ProcessEnv = process.env,
): Promise<void> {
  const url = endpointOf(tracing.endpoint, environment);
  if (url === undefined) return;
  try {
    active = await load(service, url, Number(environment['OTEL_BSP_SCHEDULE_DELAY']), log);
    log.info({ endpoint: url }, 'spans are sent to OpenTelemetry');
  } catch (error) {
    const missing = (error as NodeJS.ErrnoException).code === 'ERR_MODULE_NOT_FOUND';
    log.error(
      { endpoint: url, err: error },
      missing
        ? 'no spans are sent: the packages of OpenTelemetry are not installed (npm leaves them out with --omit=optional)'
        : 'no spans are sent; everything else works',
    );
  }
}

/** Sends what is left, for at most two seconds. */
export async function closeTracing(): Promise<void> {
  const closing = active;
  active = undefined;
  await closing?.close();
}

/** @returns where spans go, `…/v1/traces`; undefined: nowhere */
function endpointOf(configured: string, environment: NodeJS.ProcessEnv): string | undefined {
  if (environment['OTEL_SDK_DISABLED'] === 'true') return undefined;
  const ofTraces = environment['OTEL_EXPORTER_OTLP_TRACES_ENDPOINT'] ?? '';
  if (configured === '' && ofTraces !== '') return ofTraces;
  const base = configured === '' ? (environment['OTEL_EXPORTER_OTLP_ENDPOINT'] ?? '') : configured;
  return base === '' ? undefined : `${base.replace(/\/+$/, '')}/v1/traces`;
}

/** @param delayMs milliseconds for which spans are collected before they are sent; NaN: as long as is usual, 5 s */
async function load(service: string, url: string, delayMs: number, log: Logger): Promise<Active> {
  const [api, { W3CTraceContextPropagator }, sdk, resources, { OTLPTraceExporter }, hooks] =
    await Promise.all([
      import('@opentelemetry/api'),
      import('@opentelemetry/core'),
      import('@opentelemetry/sdk-trace'),
      import('@opentelemetry/resources'),
      import('@opentelemetry/exporter-trace-otlp-http'),
      import('@opentelemetry/context-async-hooks'),
    ]);
  const say = (level: 'warn' | 'debug') => (message: string) =>
    log[level](`OpenTelemetry: ${message.slice(0, MESSAGE_MAX)}`);
  api.diag.setLogger(
    { error: say('warn'), warn: say('warn'), info: say('debug'), debug: say('debug'), verbose: say('debug') },
    api.DiagLogLevel.WARN,
  );
  const provider = new sdk.TracerProvider({
    resource: resources
      .resourceFromAttributes({ 'service.name': service, 'service.version': VERSION })
      // OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME.
      .merge(resources.detectResources({ detectors: [resources.envDetector] })),
    // Headers, time limits and compression as OTEL_EXPORTER_OTLP_… say.
    spanProcessors: [
      new sdk.BatchSpanProcessor({
        exporter: new OTLPTraceExporter({ url }),
        ...(delayMs > 0 && { scheduledDelayMillis: delayMs }),
      }),
    ],
  });
  api.context.setGlobalContextManager(new hooks.AsyncLocalStorageContextManager().enable());
  return {
    api,
    tracer: provider.getTracer('erofs-nbd', VERSION),
    propagator: new W3CTraceContextPropagator(),
    close: async () => {
      const sent = provider
        .shutdown()
        .catch((error: unknown) => log.debug({ err: error }, 'the last spans are lost'));
      await Promise.race([sent, new Promise((resolve) => setTimeout(resolve, CLOSE_TIMEOUT).unref())]);
    },
  };
}

/** Work that goes on behind a call outlives the call's span, and is not part of it. */
function parentOf({ api }: Active): Api.Context {
  const now = api.context.active();
  return api.trace.getSpan(now)?.isRecording() === true ? now : api.ROOT_CONTEXT;
}

/** Runs work as a span, below the one that is under way here, or its caller's. */
export async function traced<T>(
  name: string,
  { kind, attributes = {}, carrier, outcome, isTrouble }: SpanOptions,
  work: (span: TraceSpan) => T | Promise<T>,
): Promise<T> {
  const on = active;
  if (on === undefined) return work(NO_SPAN);
  const { api, tracer, propagator } = on;
  const getter = { get: (_: unknown, header: string) => carrier?.(header), keys: () => [] };
  const parent =
    carrier === undefined ? parentOf(on) : propagator.extract(api.ROOT_CONTEXT, undefined, getter);
  const kinds = { server: api.SpanKind.SERVER, client: api.SpanKind.CLIENT } as const;
  const span = tracer.startSpan(
    name,
    { kind: kind === undefined ? api.SpanKind.INTERNAL : kinds[kind], attributes: given(attributes) },
    parent,
  );
  const set = (more: SpanAttributes): void => void span.setAttributes(given(more));
  try {
    const result = await api.context.with(api.trace.setSpan(parent, span), () => work({ set }));
    if (outcome !== undefined) set(outcome(undefined));
    return result;
  } catch (error) {
    if (outcome !== undefined) set(outcome(error));
    if (isTrouble?.(error) !== false)
      span.setStatus({ code: api.SpanStatusCode.ERROR, message: messageOf(error) });
    throw error;
  } finally {
    span.end();
  }
}

/** Adds to the span that is under way here. */
export function annotate(attributes: SpanAttributes): void {
  if (active === undefined) return;
  active.api.trace.getActiveSpan()?.setAttributes(given(attributes));
}

/** What a call takes along, so that the other side's spans are below the one that is under way here. */
export function traceHeaders(): Readonly<Record<string, string>> {
  if (active === undefined) return NO_HEADERS;
  const headers: Record<string, string> = {};
  active.propagator.inject(parentOf(active), headers, {
    set: (carrier: Record<string, string>, name: string, value: string) => (carrier[name] = value),
  });
  return headers;
}

/**
 * A span of its own trace that is over.
 *
 * @param startedAt on the clock of `performance.now`
 * @param error what it failed with; undefined when it did not
 */
export function tracedBefore(
  name: string,
  startedAt: number,
  attributes: SpanAttributes,
  error: unknown,
): void {
  if (active === undefined) return;
  const { api, tracer } = active;
  const startTime = performance.timeOrigin + startedAt;
  const span = tracer.startSpan(name, { startTime, attributes: given(attributes) }, api.ROOT_CONTEXT);
  if (error !== undefined) span.setStatus({ code: api.SpanStatusCode.ERROR, message: messageOf(error) });
  span.end(performance.timeOrigin + performance.now());
}

function given(attributes: SpanAttributes): Api.Attributes {
  return Object.fromEntries(
    Object.entries(attributes).map(([name, value]) => [name, typeof value === 'object' ? [...value] : value]),
  );
}

function messageOf(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).slice(0, MESSAGE_MAX);
}
