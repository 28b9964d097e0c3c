/**
 * Mounting and unmounting in child processes with a time limit.
 *
 * A mount reads the device's first blocks, an umount may write back and wait: on a device that does not answer either
 * would hold a thread of the process that calls (libuv has four) for as long as it takes. A child can be waited for, and
 * given up. A few children are kept for a while after use, since a pull mounts many layers and starting Node takes longer
 * than a mount.
 */
import { fork, type ChildProcess } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { traced } from '../daemon/tracing.js';

export type MountRequest =
  | { readonly operation: 'mount'; readonly source: string; readonly target: string }
  | { readonly operation: 'bind'; readonly source: string; readonly target: string; readonly flags: number }
  | {
      readonly operation: 'overlay';
      /** What the lower directories are relative to: mount(2) takes one page of options. */
      readonly directory: string;
      /** The nearest first. */
      readonly lower: readonly string[];
      readonly target: string;
      readonly flags: number;
    }
  | { readonly operation: 'unmount'; readonly target: string; readonly lazy: boolean };

export type MountReply =
  { readonly ok: true } | { readonly ok: false; readonly code: string; readonly message: string };

/** A mount or umount that failed or did not end in time. The message names the call, the place and the errno. */
export class MountError extends Error {
  override readonly name = 'MountError';

  constructor(
    message: string,
    /** `EBUSY`, `EINVAL`, …; `ETIMEDOUT` when there was no answer in time; empty when the child failed. */
    readonly code: string,
  ) {
    super(message);
  }
}

interface Waiting {
  readonly request: MountRequest;
  readonly settle: (reply: MountReply) => void;
}

const CHILD_PROGRAM = fileURLToPath(new URL('./mount-child.js', import.meta.url));

export interface MounterOptions {
  /** Milliseconds after which a call is given up. */
  readonly timeoutMs: number;
  /** Children at the same time; a mount that waits for the registry holds one. */
  readonly maxChildren?: number;
  /** Milliseconds an idle child is kept. */
  readonly idleMs?: number;
  /** The child's program, for tests. */
  readonly program?: string;
}

export class Mounter {
  readonly #timeoutMs: number;
  readonly #maxChildren: number;
  readonly #idleMs: number;
  readonly #program: string;
  readonly #queue: Waiting[] = [];
  readonly #idle: { child: ChildProcess; timer: NodeJS.Timeout }[] = [];
  /** Those that work or can; not one that was given up and may hang in the kernel for as long as its device does. */
  readonly #children = new Set<ChildProcess>();

  constructor(options: MounterOptions) {
    this.#timeoutMs = options.timeoutMs;
    this.#maxChildren = options.maxChildren ?? 4;
    this.#idleMs = options.idleMs ?? 3000;
    this.#program = options.program ?? CHILD_PROGRAM;
  }

  /** Something will be mounted soon: a child is started for it beside what comes before that. */
  expect(): void {
    if (this.#children.size === 0) this.#keep(this.#start());
  }

  /**
   * Mounts an EROFS image read-only.
   *
   * @param source a block device, or (Linux >= 6.12) a file
   * @throws {MountError}
   */
  mountErofs(source: string, target: string): Promise<void> {
    return traced('mount', { attributes: { 'erofs_nbd.device': source } }, () =>
      this.#call({ operation: 'mount', source, target }),
    );
  }

  /**
   * Shows a directory at another place too.
   *
   * @param flags of mount(2), for that place
   * @throws {MountError}
   */
  bind(source: string, target: string, flags: number): Promise<void> {
    return this.#call({ operation: 'bind', source, target, flags });
  }

  /**
   * Stacks directories by overlayfs, without a place to write to.
   *
   * @param lower at least two, relative to `directory`, the nearest first
   * @param flags of mount(2)
   * @throws {MountError}
   */
  overlay(directory: string, lower: readonly string[], target: string, flags: number): Promise<void> {
    return this.#call({ operation: 'overlay', directory, lower, target, flags });
  }

  /**
   * Unmounts what is on top at this place.
   *
   * @param lazy detach at once and let the kernel finish when the last user is gone; only for a mount whose server is dead
   * @throws {MountError}
   */
  unmount(target: string, lazy = false): Promise<void> {
    return this.#call({ operation: 'unmount', target, lazy });
  }

  /** Ends the idle children. Calls under way are not waited for. */
  close(): void {
    for (const { child, timer } of this.#idle.splice(0)) {
      clearTimeout(timer);
      if (child.connected) child.disconnect();
    }
  }

  async #call(request: MountRequest): Promise<void> {
    const reply = await new Promise<MountReply>((settle) => {
      this.#queue.push({ request, settle });
      this.#next();
    });
    if (!reply.ok) throw new MountError(reply.message, reply.code);
  }

  #next(): void {
    const kept = this.#idle.pop();
    if (kept === undefined && this.#children.size >= this.#maxChildren) return;
    const waiting = this.#queue.shift();
    if (waiting === undefined) {
      if (kept !== undefined) this.#idle.push(kept);
      return;
    }
    if (kept !== undefined) clearTimeout(kept.timer);
    this.#carryOut(kept?.child ?? this.#start(), waiting);
  }

  #start(): ChildProcess {
    const child = fork(this.#program, [], { execArgv: [], stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
    this.#children.add(child);
    child.once('exit', () => this.#lost(child));
    // Also for as long as it is idle: an error nobody listens to would end this process.
    child.on('error', () => {
      if (child.pid === undefined) this.#lost(child);
    });
    return child;
  }

  /** The child carries nothing out any more; another may be started for it. */
  #lost(child: ChildProcess): void {
    this.#children.delete(child);
    const index = this.#idle.findIndex((kept) => kept.child === child);
    if (index >= 0) clearTimeout(this.#idle.splice(index, 1)[0]?.timer);
    this.#next();
  }

  #carryOut(child: ChildProcess, { request, settle }: Waiting): void {
    const what = nameOf(request);
    let finished = false;
    const finish = (reply: MountReply, reusable: boolean): void => {
      if (finished) return;
      finished = true;
      clearTimeout(timer);
      child.removeAllListeners('message');
      child.removeListener('exit', onExit);
      child.removeListener('error', onError);
      if (reusable) this.#keep(child);
      settle(reply);
      this.#next();
    };
    const onExit = (code: number | null, signal: string | null): void =>
      finish(
        { ok: false, code: '', message: `${what} ${request.target}: child ended (${signal ?? code})` },
        false,
      );
    const onError = (error: Error): void => {
      child.kill('SIGKILL');
      finish({ ok: false, code: '', message: `${what} ${request.target}: ${error.message}` }, false);
    };
    const timer = setTimeout(() => {
      // In uninterruptible sleep it does not die before the device answers or is taken away: other calls do not wait.
      child.kill('SIGKILL');
      this.#children.delete(child);
      const message = `${what} ${request.target}: no answer within ${this.#timeoutMs} ms`;
      finish({ ok: false, code: 'ETIMEDOUT', message }, false);
    }, this.#timeoutMs);
    child.once('exit', onExit);
    child.once('error', onError);
    child.once('message', (reply: MountReply) => finish(reply, child.connected));
    child.send(request, (error) => {
      if (error !== null) onError(error);
    });
  }

  #keep(child: ChildProcess): void {
    const timer = setTimeout(() => {
      const index = this.#idle.findIndex((kept) => kept.child === child);
      if (index >= 0) this.#idle.splice(index, 1);
      if (child.connected) child.disconnect();
    }, this.#idleMs);
    timer.unref();
    child.unref();
    child.channel?.unref();
    this.#idle.push({ child, timer });
  }
}

function nameOf(request: MountRequest): string {
  if (request.operation === 'unmount') return 'umount of';
  const source = request.operation === 'overlay' ? `${request.lower.length} layers` : request.source;
  return `mount of ${source} on`;
}
