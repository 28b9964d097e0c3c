/**
 * containerd as a command finds it: the options that say which one is meant, and what to say when it does not answer.
 */
import * as grpc from '@grpc/grpc-js';
import { Option, type Command } from 'commander';
import type { CallError } from '../proto/unary-call.js';
import { Failure } from './failure.js';

export interface ContainerdOptions {
  readonly address?: string;
  readonly namespace: string;
}

/** Adds them. */
export function withContainerdOptions(command: Command): Command {
  return command
    .addOption(
      new Option(
        '--address <socket>',
        "containerd's socket (default: containerd.address of the configuration)",
      ).env('CONTAINERD_ADDRESS'),
    )
    .addOption(
      new Option('-n, --namespace <name>', "containerd's namespace")
        .env('CONTAINERD_NAMESPACE')
        .default('default'),
    );
}

/** @returns undefined when it has answered */
export function noContainerd(error: CallError, address: string): Failure | undefined {
  if (error.code !== grpc.status.UNAVAILABLE || !error.message.includes('No connection established'))
    return undefined;
  return new Failure(
    `containerd does not answer on ${address}; is it running, and is that its socket (--address)?`,
    undefined,
    { cause: error },
  );
}
