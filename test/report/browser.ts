/**
 * Debian's Chromium without a window, spoken to as its developer tools do (Chrome DevTools Protocol, over a web socket).
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { WebSocket } from 'undici';
import { cacheDirectory, fetchPackages, fetchWithDependencies } from '../debian/packages.js';
import { withMissingLibraries } from '../debian/missing-libraries.js';
import { patience } from '../patience.js';

const PACKAGES = ['chromium-headless-shell', 'chromium-common'];

async function chromium(): Promise<string> {
  const directory = path.join(cacheDirectory(), 'roots', 'chromium');
  await fetchPackages('system', directory, PACKAGES);
  const file = path.join(directory, 'usr', 'lib', 'chromium', 'chromium-headless-shell');
  return withMissingLibraries(file, (all) => fetchWithDependencies('system', all, PACKAGES));
}

interface Answer {
  readonly id?: number;
  readonly method?: string;
  readonly params?: unknown;
  readonly result?: unknown;
  readonly error?: { readonly message: string };
}

/** One page in a browser of its own. */
export class Browser {
  /** Events that came, by name. */
  readonly events: { readonly method: string; readonly params: unknown }[] = [];
  readonly #process: ChildProcess;
  readonly #socket: WebSocket;
  readonly #directory: string;
  readonly #waiting = new Map<number, (answer: Answer) => void>();
  #id = 0;

  private constructor(process: ChildProcess, socket: WebSocket, directory: string) {
    this.#process = process;
    this.#socket = socket;
    this.#directory = directory;
    socket.addEventListener('message', ({ data }) => {
      const answer = JSON.parse(String(data)) as Answer;
      if (answer.id !== undefined) this.#waiting.get(answer.id)?.(answer);
      else if (answer.method !== undefined)
        this.events.push({ method: answer.method, params: answer.params });
    });
  }

  static async start(): Promise<Browser> {
    const program = await chromium();
    const directory = await mkdtemp(path.join(tmpdir(), 'erofs-nbd-browser-'));
    const child = spawn(
      program,
      [
        '--no-sandbox',
        '--disable-gpu',
        '--disable-dev-shm-usage',
        `--user-data-dir=${directory}`,
        '--remote-debugging-port=0',
        '--window-size=1100,900',
        'about:blank',
      ],
      { stdio: ['ignore', 'ignore', 'pipe'] },
    );
    const address = await debuggerOf(child);
    // The browser's own address; a page has one beside it.
    const list = (await (await fetch(`http://${new URL(address).host}/json/list`)).json()) as {
      type: string;
      webSocketDebuggerUrl: string;
    }[];
    const page = list.find(({ type }) => type === 'page');
    if (page === undefined) throw new Error('the browser has no page');
    const socket = new WebSocket(page.webSocketDebuggerUrl);
    await once(socket as unknown as EventTarget, 'open');
    return new Browser(child, socket, directory);
  }

  async send(method: string, params: object = {}): Promise<unknown> {
    const id = ++this.#id;
    const answered = new Promise<Answer>((resolve) => this.#waiting.set(id, resolve));
    this.#socket.send(JSON.stringify({ id, method, params }));
    const { result, error } = await answered;
    this.#waiting.delete(id);
    if (error !== undefined) throw new Error(`${method}: ${error.message}`);
    return result;
  }

  /** The value of an expression on the page. */
  async evaluate<T>(expression: string): Promise<T> {
    const { result, exceptionDetails } = (await this.send('Runtime.evaluate', {
      expression,
      returnByValue: true,
      awaitPromise: true,
    })) as { result: { value: T }; exceptionDetails?: { text: string } };
    if (exceptionDetails !== undefined) throw new Error(`${exceptionDetails.text} in ${expression}`);
    return result.value;
  }

  async close(): Promise<void> {
    this.#socket.close();
    const exit = once(this.#process, 'exit');
    this.#process.kill();
    await exit;
    await rm(this.#directory, { recursive: true, force: true, maxRetries: 5 });
  }
}

async function debuggerOf(child: ChildProcess): Promise<string> {
  if (child.stderr === null) throw new Error('the browser was started without a pipe');
  const said: string[] = [];
  const lines = createInterface({ input: child.stderr });
  const found = new Promise<string>((resolve, reject) => {
    lines.on('line', (line) => {
      said.push(line);
      const address = /^DevTools listening on (ws:\S+)/.exec(line)?.[1];
      if (address !== undefined) resolve(address);
    });
    child.once('exit', (code) => reject(new Error(`the browser ended with ${code}:\n${said.join('\n')}`)));
    setTimeout(
      () => reject(new Error(`the browser says nothing:\n${said.join('\n')}`)),
      patience(30_000),
    ).unref();
  });
  return found;
}
