/**
 * What is started: images of Debian packages, each with a command that does something real, prints one line and ends.
 */
import { mkdir, readdir, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { buildDebianImage, GREETING } from '../../image/debian-image.js';
import type { Image, ImageOptions } from '../../image/oci-layout.js';
import { BASE_LAYER, buildPackageImage, type PackageImage } from '../../image/package-image.js';

export interface ColdImage {
  readonly name: string;
  /** What its command does, in a few words. */
  readonly does: string;
  /** What the line it prints starts with. */
  readonly greeting: string;
  readonly build: (options: ImageOptions, progress: (message: string) => void) => Promise<Image>;
}

const PATH = 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin';

const NODE_PROGRAM = `const http = require('http');
const ts = require('typescript');

const source = 'export const answer = (question: string): number => question.length * 6;';
const { outputText } = ts.transpileModule(source, {
  compilerOptions: { module: ts.ModuleKind.CommonJS, target: ts.ScriptTarget.ES2020 },
});
const compiled = {};
new Function('exports', outputText)(compiled);

const server = http.createServer((request, response) => response.end(String(compiled.answer(request.url))));
server.listen(0, '127.0.0.1', () => {
  http.get({ host: '127.0.0.1', port: server.address().port, path: '/sevens', agent: false }, (response) => {
    response.on('data', (body) => {
      console.log('Hello from Node.js ' + process.version + ' and TypeScript ' + ts.version + ': ' + body);
      server.close();
    });
  });
});
`;

const JAVA_PROGRAM = `(import '(com.sun.net.httpserver HttpServer HttpHandler) '(java.net InetSocketAddress URL))
(require '[clojure.string :as string])
(let [server (HttpServer/create (InetSocketAddress. "127.0.0.1" 0) 0)]
  (.createContext server "/" (reify HttpHandler
    (handle [_ exchange]
      (let [answer (.getBytes (string/upper-case (str (.getRequestURI exchange))))]
        (.sendResponseHeaders exchange 200 (count answer))
        (with-open [body (.getResponseBody exchange)] (.write body answer))))))
  (.start server)
  (println "Hello from Java" (System/getProperty "java.version") "and Clojure" (str (clojure-version) ":")
    (slurp (URL. (str "http://127.0.0.1:" (.getPort (.getAddress server)) "/served"))))
  (flush)
  (.stop server 0)
  (System/exit 0))
`;

const application = (name: string, file: string, text: string): PackageImage['application'] => ({
  name,
  write: async (directory) => {
    await mkdir(path.join(directory, 'app'), { recursive: true });
    await writeFile(path.join(directory, 'app', file), text);
  },
});

const NODE: PackageImage = {
  name: 'debian-node',
  layers: [
    BASE_LAYER,
    { name: '2-node', packages: ['nodejs'] },
    { name: '3-typescript', packages: ['node-typescript'] },
  ],
  inputs: (layers) => ({ layers, NODE_PROGRAM }),
  configuration: {
    Env: [PATH, 'NODE_PATH=/usr/share/nodejs'],
    Cmd: ['node', '/app/server.js'],
    WorkingDir: '/',
  },
  application: application('4-application', 'server.js', NODE_PROGRAM),
};

const CLASS_PATH = ['clojure', 'spec.alpha', 'core.specs.alpha'].map((name) => `/usr/share/java/${name}.jar`);

const JAVA: PackageImage = {
  name: 'debian-java',
  layers: [
    BASE_LAYER,
    { name: '2-java', packages: ['openjdk-17-jre-headless'] },
    { name: '3-clojure', packages: ['libclojure-java'] },
  ],
  inputs: (layers) => ({ revision: 1, layers, JAVA_PROGRAM }),
  configuration: {
    Env: [PATH],
    Cmd: [
      `/usr/lib/jvm/java-17-openjdk-${process.arch === 'x64' ? 'amd64' : process.arch}/bin/java`,
      ...['-cp', CLASS_PATH.join(':'), 'clojure.main', '/app/server.clj'],
    ],
    WorkingDir: '/',
  },
  // Debian makes the name without a version by a link on installation.
  finish: async (layer, directory) => {
    if (layer !== '3-clojure') return;
    const inside = path.join(directory, 'usr', 'share', 'java');
    const jar = (await readdir(inside)).find((name) => /^clojure-\d+\.\d+\.\d+\.jar$/.test(name));
    if (jar === undefined) throw new Error(`no clojure-*.jar in ${inside}`);
    await symlink(jar, path.join(inside, 'clojure.jar'));
  },
  application: application('4-application', 'server.clj', JAVA_PROGRAM),
};

export const IMAGES: readonly ColdImage[] = [
  {
    name: 'python',
    does: 'imports NumPy and looks a row of a table up',
    greeting: GREETING,
    build: buildDebianImage,
  },
  {
    name: 'node',
    does: 'compiles TypeScript, starts an HTTP server and asks it',
    greeting: 'Hello from Node.js ',
    build: (options, progress) => buildPackageImage(NODE, options, progress),
  },
  {
    name: 'java',
    does: 'loads Clojure, starts an HTTP server and asks it',
    greeting: 'Hello from Java ',
    build: (options, progress) => buildPackageImage(JAVA, options, progress),
  },
];
