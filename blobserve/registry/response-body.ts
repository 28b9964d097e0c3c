/**
 * The body of a response, consumed in one of three ways: chunk by chunk, whole up to a limit, or not at all. Whichever
 * way it ends, the connection goes back to the pool (body read to its end) or is closed; it never stays behind.
 */
import type { Dispatcher } from 'undici';

/** A body that did not come to its end. */
export interface BrokenBody {
  readonly error: Error;
  /** Nothing of it had come. */
  readonly atOnce: boolean;
}

export class ResponseBody {
  readonly #body: Dispatcher.ResponseData['body'];
  readonly #toError: (error: unknown) => Error;
  readonly #done: (broken?: BrokenBody) => void;
  #failure: Error | undefined;
  #taken = false;
  /** We closed the connection; the library then reports that as an error of the body. */
  #dropped = false;
  #received = false;

  /**
   * @param toError makes what the client library reports into our error
   * @param done called once, when the connection is free or closed, and how the body broke off when it did by itself
   */
  constructor(
    body: Dispatcher.ResponseData['body'],
    toError: (error: unknown) => Error,
    done: (broken?: BrokenBody) => void,
  ) {
    this.#body = body;
    this.#toError = toError;
    this.#done = done;
    // From here on a connection that breaks is remembered rather than thrown at the process.
    body.on('error', (error: unknown) => {
      this.#failure ??= this.#toError(error);
    });
    body.once('close', () => {
      const error = this.#failure;
      if (error === undefined || this.#dropped) this.#done();
      else this.#done({ error, atOnce: !this.#received });
    });
  }

  /**
   * Hands every chunk to `take` as it arrives, until the body ends or `take` returns false (then the connection is
   * closed, for the rest of the body is still on it). A chunk is only valid during the call.
   *
   * @returns whether the body was read to its end
   * @throws {Error} of the transport when the body breaks off; whatever `take` throws, after closing the connection
   */
  forEachChunk(take: (chunk: Buffer) => boolean): Promise<boolean> {
    const body = this.#take();
    if (body.closed) return Promise.reject(this.#failure ?? this.#toError(new Error('the body is closed')));
    return new Promise<boolean>((resolve, reject) => {
      let ended = false;
      let stopped = false;
      let thrown: { error: unknown } | undefined;
      body.once('close', () => {
        if (thrown) reject(thrown.error);
        else if (stopped) resolve(false);
        else if (ended && this.#failure === undefined) resolve(true);
        else reject(this.#failure ?? this.#toError(new Error('the body was closed before its end')));
      });
      body.once('end', () => {
        ended = true;
      });
      body.on('data', (chunk: Buffer) => {
        if (stopped || thrown) return;
        this.#received = true;
        try {
          stopped = !take(chunk);
        } catch (error) {
          thrown = { error };
        }
        if (stopped || thrown) this.#drop();
      });
    });
  }

  /**
   * The whole body, or undefined when it is longer than `maxBytes` (then the connection is closed; at most one chunk
   * more than that is ever held).
   *
   * @throws {Error} of the transport when the body breaks off
   */
  async readAll(maxBytes: number): Promise<Buffer | undefined> {
    const chunks: Buffer[] = [];
    let length = 0;
    const whole = await this.forEachChunk((chunk) => {
      length += chunk.length;
      if (length > maxBytes) return false;
      chunks.push(chunk);
      return true;
    });
    return whole ? Buffer.concat(chunks, length) : undefined;
  }

  /** Drops the body: reads it to its end when that is within `maxBytes`, else closes the connection. Never fails. */
  async discard(maxBytes = 16_384): Promise<void> {
    if (this.#taken || this.#body.closed) return;
    let length = 0;
    await this.forEachChunk((chunk) => {
      length += chunk.length;
      return length <= maxBytes;
    }).then(ignore, ignore);
  }

  /** Closes the connection. */
  destroy(): void {
    this.#taken = true;
    this.#drop();
  }

  #drop(): void {
    this.#dropped = true;
    this.#body.destroy();
  }

  #take(): Dispatcher.ResponseData['body'] {
    if (this.#taken) throw new Error('the body of a response was taken twice');
    this.#taken = true;
    return this.#body;
  }
}

/** For outcomes that are of no interest: of a body that is dropped anyway. */
function ignore(): void {
  return undefined;
}
