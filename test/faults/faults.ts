/**
 * The faults, each with what a reader is to get of it.
 */
import { gzipSync } from 'node:zlib';
import { writeHead, type Fault, type Meeting } from './fault-proxy.js';

/**
 * What reads come to when every request meets the fault: `right` bytes all the same, or an `error`. When each read meets
 * it once, they come to the right bytes; except that a `final` answer is believed at once.
 */
export type Always = 'right' | 'error' | 'final';

export interface NamedFault {
  readonly name: string;
  readonly fault: Fault;
  readonly always: Always;
  /** Status that the error is to name. */
  readonly status?: number;
  /** Met with short time limits, for it is about them. */
  readonly hurry?: true;
  /** What the error is to say besides. */
  readonly says?: RegExp;
}

/** The registry's answer with something else in it. */
function changed(
  change: (
    answer: { headers: Record<string, string>; body: Buffer; status: number },
    meeting: Meeting,
  ) => void,
): Fault {
  return async (meeting) => {
    const { status, headers, body } = await meeting.ask();
    const answer = { status, headers: { ...headers }, body: Buffer.from(body) };
    change(answer, meeting);
    writeHead(meeting.socket, answer.status, answer.headers);
    meeting.socket.end(answer.body);
  };
}

/** The head and so many bytes of the body, then `end`. */
function cutAt(share: number, end: (meeting: Meeting) => void): Fault {
  return async (meeting) => {
    const { status, headers, body } = await meeting.ask();
    writeHead(meeting.socket, status, headers);
    meeting.socket.write(body.subarray(0, Math.ceil(body.length * share)), () => end(meeting));
  };
}

function answers(status: number, headers: Readonly<Record<string, string>> = {}): Fault {
  return ({ response }) => {
    response.writeHead(status, headers);
    response.end(`{"errors":[{"code":"FAULT","message":"status ${status}"}]}`);
  };
}

const reset = ({ socket, proxy }: Meeting): void => {
  // A reset overtakes data that is not read yet, so give the data a moment.
  proxy.later(20, () => socket.resetAndDestroy());
};

function redirects(status: number, hops: number): Fault {
  return async (meeting) => {
    const { request, response, proxy, pass } = meeting;
    const url = new URL(request.url ?? '/', `http://${proxy.storageHost}`);
    const hop = Number(url.searchParams.get('hop') ?? 0);
    if (hop >= hops) {
      await pass();
      return;
    }
    url.searchParams.set('hop', String(hop + 1));
    response.writeHead(status, { location: url.href });
    response.end();
  };
}

/** To a storage service that takes each signature so many times; then it is over, which the reader cannot know before. */
function signed(times: number): Fault {
  const uses = new Map<string, number>();
  return async ({ request, response, proxy, pass }) => {
    const url = new URL(request.url ?? '/', `http://${proxy.storageHost}`);
    const signature = url.searchParams.get('signature');
    if (signature === null) {
      url.searchParams.set('signature', `${proxy.host} ${proxy.requests}`);
      response.writeHead(307, { location: url.href });
      response.end();
      return;
    }
    const used = (uses.get(signature) ?? 0) + 1;
    uses.set(signature, used);
    if (used <= times) {
      await pass();
      return;
    }
    response.writeHead(403, { 'content-type': 'application/xml' });
    response.end('<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>');
  };
}

const drip: Fault = async (meeting) => {
  const { status, headers, body } = await meeting.ask();
  writeHead(meeting.socket, status, headers);
  let sent = 0;
  const step = (): void => {
    if (meeting.socket.destroyed) return;
    meeting.socket.write(body.subarray(sent, ++sent));
    meeting.proxy.later(25, step);
  };
  step();
};

const endless: Fault = ({ socket, range }) => {
  const [start, end] = range ?? [0, 0];
  socket.write(`HTTP/1.1 206 Fault\r\ncontent-range: bytes ${start}-${end}/*\r\nconnection: close\r\n\r\n`);
  const junk = Buffer.alloc(65_536, 'x');
  const pump = (): void => {
    while (!socket.destroyed && socket.write(junk)) continue;
  };
  socket.on('drain', pump);
  pump();
};

export const FAULTS: readonly NamedFault[] = [
  { name: 'delay', fault: ({ proxy, pass }) => proxy.later(120, () => void pass()), always: 'right' },
  { name: 'dropped at byte N', fault: cutAt(0.9, ({ socket }) => socket.end()), always: 'right' },
  { name: 'dropped before the answer', fault: ({ socket }) => socket.end(), always: 'error' },
  { name: 'reset at byte N', fault: cutAt(0.9, reset), always: 'right' },
  { name: 'reset before the answer', fault: ({ socket }) => socket.resetAndDestroy(), always: 'error' },
  {
    name: 'hangs before the answer',
    fault: () => undefined,
    always: 'error',
    hurry: true,
    says: /no answer .* within|came free/,
  },
  {
    name: 'hangs in the body',
    fault: cutAt(0, () => undefined),
    always: 'error',
    hurry: true,
    says: /stalled for|came free|no answer/,
  },
  {
    name: 'corrupt byte N',
    fault: changed(({ body }) => {
      const at = Math.floor(body.length / 3);
      body[at] = (body[at] ?? 0) ^ 0x40;
    }),
    always: 'error',
    says: /digest/,
  },
  {
    name: '200 with everything',
    fault: async (meeting) => {
      const { headers, body } = await meeting.ask({});
      writeHead(meeting.socket, 200, headers);
      meeting.socket.end(body);
    },
    always: 'right',
  },
  {
    name: '206 with another range',
    fault: async (meeting) => {
      const [start, end] = meeting.range ?? [0, 0];
      const shift = start > 0 ? -1 : 1;
      const { status, headers, body } = await meeting.ask({ range: `bytes=${start + shift}-${end + shift}` });
      writeHead(meeting.socket, status, headers);
      meeting.socket.end(body);
    },
    always: 'error',
    says: /not "bytes /,
  },
  {
    name: 'wrong Content-Range',
    fault: changed(({ headers }) => {
      headers['content-range'] = (headers['content-range'] ?? '').replace(
        /\d+-/,
        (start) => `${parseInt(start) + 1}-`,
      );
    }),
    always: 'error',
    says: /not "bytes /,
  },
  {
    name: 'no Content-Range',
    fault: changed(({ headers }) => delete headers['content-range']),
    always: 'error',
    says: /not "bytes /,
  },
  {
    name: 'Content-Length too small',
    fault: changed(({ headers, body }) => (headers['content-length'] = String(body.length - 7))),
    always: 'error',
    says: /length of/,
  },
  {
    name: 'Content-Length too large',
    fault: changed(({ headers, body }) => (headers['content-length'] = String(body.length + 7))),
    always: 'error',
    says: /length of/,
  },
  {
    name: 'gzip Content-Encoding',
    fault: changed((answer) => {
      answer.body = gzipSync(answer.body);
      answer.headers['content-encoding'] = 'gzip';
      answer.headers['content-length'] = String(answer.body.length);
    }),
    always: 'error',
    says: /content encoding "gzip"/,
  },
  { name: '301, three times', fault: redirects(301, 3), always: 'right' },
  { name: '302, three times', fault: redirects(302, 3), always: 'right' },
  { name: '307, three times', fault: redirects(307, 3), always: 'right' },
  { name: '308, three times', fault: redirects(308, 3), always: 'right' },
  {
    name: 'redirects without end',
    fault: redirects(307, 1e9),
    always: 'error',
    says: /more than 10 redirects/,
  },
  {
    name: 'a redirect to itself',
    fault: ({ request, response }) => {
      response.writeHead(302, { location: request.url ?? '/' });
      response.end();
    },
    always: 'error',
    says: /in a circle/,
  },
  { name: 'signed URLs for three uses', fault: signed(3), always: 'right' },
  { name: 'signed URLs that are over', fault: signed(0), always: 'error', status: 403 },
  {
    name: '401 with a new challenge',
    fault: answers(401, { 'www-authenticate': 'Basic realm="another"' }),
    always: 'error',
    status: 401,
    says: /log in to/,
  },
  { name: '403', fault: answers(403), always: 'error', status: 403 },
  { name: '404', fault: answers(404), always: 'final', status: 404 },
  { name: '416', fault: answers(416, { 'content-range': 'bytes */1' }), always: 'error', status: 416 },
  { name: '429', fault: answers(429), always: 'error', status: 429 },
  { name: '429, Retry-After: 1', fault: answers(429, { 'retry-after': '1' }), always: 'error' },
  {
    name: '429, Retry-After: a date',
    fault: (meeting) => answers(429, { 'retry-after': new Date(Date.now() + 1500).toUTCString() })(meeting),
    always: 'error',
  },
  { name: '500', fault: answers(500), always: 'error', status: 500 },
  { name: '502', fault: answers(502), always: 'error', status: 502 },
  { name: '503', fault: answers(503), always: 'error', status: 503 },
  { name: '503, Retry-After: 1', fault: answers(503, { 'retry-after': '1' }), always: 'error' },
  { name: '504', fault: answers(504), always: 'error', status: 504 },
  {
    name: 'slow loris',
    fault: drip,
    always: 'error',
    hurry: true,
    says: /took longer than|stalled|left alone|came free|no answer/,
  },
  { name: 'endless body', fault: endless, always: 'error' },
  { name: 'no HTTP', fault: ({ socket }) => socket.end('hello\r\n\r\n'), always: 'error' },
];
