/**
 * The span of a gRPC call that a daemon answers: whose trace it is part of, and how it ended.
 */
import * as grpc from '@grpc/grpc-js';
import type { SpanAttributes, SpanOptions } from './tracing.js';

/** Codes that mean trouble here; all others are answers (OpenTelemetry, semantic conventions for gRPC). */
const TROUBLE = new Set([
  grpc.status.UNKNOWN,
  grpc.status.DEADLINE_EXCEEDED,
  grpc.status.UNIMPLEMENTED,
  grpc.status.INTERNAL,
  grpc.status.UNAVAILABLE,
  grpc.status.DATA_LOSS,
]);

export interface AnsweredCall {
  /** Full name, with its package. */
  readonly service: string;
  readonly method: string;
  readonly metadata: grpc.Metadata;
  readonly attributes: SpanAttributes;
  /** The code that an error is answered with. */
  readonly statusOf: (error: unknown) => grpc.status;
}

export function callSpan({ service, method, metadata, attributes, statusOf }: AnsweredCall): SpanOptions {
  const codeOf = (error: unknown): grpc.status => (error === undefined ? grpc.status.OK : statusOf(error));
  return {
    kind: 'server',
    attributes: { 'rpc.system': 'grpc', 'rpc.service': service, 'rpc.method': method, ...attributes },
    carrier: (header) => metadata.get(header)[0]?.toString(),
    outcome: (error) => ({ 'rpc.grpc.status_code': codeOf(error) }),
    isTrouble: (error) => TROUBLE.has(codeOf(error)),
  };
}
