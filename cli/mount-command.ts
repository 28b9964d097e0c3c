/**
 * `erofs-nbd mount SOURCE DIR`: mounts an image, one of its layers or a file by hand, as `mount.erofs -t erofs.nbd` does.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { type Command, Option } from 'commander';
import { openRegistryClient } from '../blobserve/open-registry-client.js';
import { PasswordCredentials } from '../blobserve/registry/credentials.js';
import { placeOfPull, PullCredentials } from '../blobserve/registry/pull-credentials.js';
import { registryHost } from '../blobserve/registry/reference.js';
import { loadConfiguration } from '../daemon/configuration.js';
import { createLogger } from '../daemon/log.js';
import { Failure } from './failure.js';
import { imageArgument } from './image-argument.js';
import { makeFree, mountByHand, mountPointOf, type MountRequest, withoutIndex } from './mount/mount.js';
import { type MountOptions, parseMountOptions } from './mount/options.js';
import { DEFAULT_CACHE, type MountRecord } from './mount/record.js';
import { demandRoot, type RuntimeOptions, withRuntimeOption } from './mount/runtime-option.js';
import {
  checkFileOptions,
  checkImageOptions,
  fileSource,
  imageSource,
  isFile,
  type MountSource,
} from './mount/sources.js';
import { formatSize } from './quantities.js';
import { interruptible, print, printJson } from './terminal.js';

interface MountCommandLine extends RuntimeOptions {
  readonly options: readonly string[];
  readonly type: string;
  readonly config?: string;
  readonly cache: string;
  readonly quiet?: true;
  readonly json?: true;
}

/** By what comes after the dot of a type. */
const BACKENDS: Readonly<Record<string, 'nbd' | 'fuse' | undefined>> = {
  erofs: undefined,
  'erofs.nbd': 'nbd',
  'erofs.fuse': 'fuse',
};

const MORE = `
Options after -o, with commas between:
  oci.blob=<digest>         the layer whose blob this is, alone
  oci.layer=<number>        the layer of this number alone; 0 is the lowest
  oci.platform=<os/arch>    of which platform (default: this machine's)
  oci.username=<name>       as whom; with oci.password or oci.password_file
  oci.password=<password>   every user of this machine can see it in the list of processes while the command runs
  oci.password_file=<file>  the password is the first line of a file
  oci.tarindex=<file>       of one tar layer: EROFS metadata, as mkfs.erofs --tar=i makes it
  oci.zinfo=<file>          of one tar.gz layer, beside its tarindex: where its compressed stream can be entered
  oci.insecure              the registry may be spoken to without TLS
  ro, nosuid, nodev, noexec, noatime, nodiratime, relatime and their opposites

Without oci.username, credentials are those of the Docker configuration (registry.docker_config).
Layers that need an index and for which none is given, kept or published are downloaded as a whole and indexed first.`;

export function addMountCommand(program: Command): void {
  withRuntimeOption(
    program
      .command('mount')
      .description('mount an image, a layer of it, or a file; its bytes are fetched when they are read')
      .argument(
        '<source>',
        'an image, host[:port]/repository[:tag][@digest]; or a file, an EROFS image, a tar or a tar.gz, which begins ' +
          'with "/", "./" or "../"',
      )
      .argument('<directory>', 'where to')
      .option('-o, --options <options>', 'see below; may be given more than once', collect, [])
      .addOption(
        new Option('-t, --type <type>', 'how layers reach the kernel: as it can be done, by nbd, by fuse')
          .choices(Object.keys(BACKENDS))
          .default('erofs'),
      )
      .option('--config <file>', "the snapshotter's configuration file (default: /etc/erofs-nbd/config.toml)")
      .option('--cache <directory>', 'where what was fetched is kept for other mounts', DEFAULT_CACHE)
      .option('-q, --quiet', 'say nothing of layers that have to be indexed first')
      .option('--json', 'print the result as JSON')
      .addHelpText('after', MORE),
  ).action(mount);
}

function collect(text: string, before: readonly string[]): readonly string[] {
  return [...before, text];
}

async function mount(source: string, directory: string, command: MountCommandLine): Promise<void> {
  const options = parseMountOptions(command.options);
  if (isFile(source)) checkFileOptions(source, options);
  else {
    imageArgument(source);
    checkImageOptions(options);
  }
  demandRoot('mounting');
  const log = createLogger('erofs-nbd mount', 'error', 'text');
  const record = await interruptible(async (signal) => {
    const mountPoint = await mountPointOf(directory);
    await makeFree(command.runtime, mountPoint, log);
    const request = await requestOf(source, options, command);
    signal.throwIfAborted();
    if (command.quiet !== true && command.json !== true)
      await sayWhatIsIndexed(request.source, request.cache);
    return mountByHand({ ...request, mountPoint, log, signal });
  });
  if (command.json === true) await printJson(record);
  else await print(sentence(record));
}

type Wanted = Omit<MountRequest, 'mountPoint' | 'log' | 'signal'>;

async function requestOf(source: string, options: MountOptions, command: MountCommandLine): Promise<Wanted> {
  const attach = BACKENDS[command.type];
  const common = {
    flags: options.flags,
    runtime: command.runtime,
    cache: path.resolve(command.cache),
    config: command.config === undefined ? undefined : path.resolve(command.config),
  };
  const settings = { ...(attach !== undefined && { attach }), noDockerConfig: false };
  if (isFile(source)) {
    return { ...common, source: await fileSource(source, options), settings, login: undefined };
  }
  const reference = imageArgument(source);
  const password = await passwordOf(options);
  const login =
    password === undefined
      ? undefined
      : {
          place: placeOfPull(reference),
          credentials: new PasswordCredentials(options.username ?? '', password),
        };
  const insecure = options.insecure ? registryHost(reference) : undefined;
  return {
    ...common,
    source: await lookUp(source, options, command, login, insecure),
    settings: {
      ...settings,
      ...(insecure !== undefined && { insecure }),
      noDockerConfig: login !== undefined,
    },
    login,
  };
}

async function lookUp(
  source: string,
  options: MountOptions,
  { config }: MountCommandLine,
  login: Wanted['login'],
  insecure: string | undefined,
): Promise<MountSource> {
  const configuration = loadConfiguration(config);
  const { registry: settings } = configuration;
  const pulls = new PullCredentials();
  if (login !== undefined) pulls.remember(login.place, login.credentials, 3_600_000);
  const registry = openRegistryClient(
    {
      ...configuration,
      registry: {
        ...settings,
        insecure: [...settings.insecure, ...(insecure === undefined ? [] : [insecure])],
        docker_config: login === undefined ? settings.docker_config : '',
      },
    },
    createLogger('erofs-nbd mount', 'warn', 'text'),
    pulls,
  );
  try {
    return await imageSource(source, options, registry);
  } finally {
    await registry.close();
  }
}

async function passwordOf({ password, passwordFile }: MountOptions): Promise<string | undefined> {
  if (passwordFile === undefined) return password;
  try {
    const [line = ''] = (await readFile(passwordFile, 'utf8')).split(/\r?\n/);
    if (line !== '') return line;
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    throw new Failure(`-o oci.password_file=${passwordFile}: cannot be read (${code ?? message})`);
  }
  throw new Failure(`-o oci.password_file=${passwordFile}: its first line is empty`);
}

/** Somebody waits who expected it to be there at once. */
async function sayWhatIsIndexed(source: MountSource, cache: string): Promise<void> {
  const missing = await withoutIndex(source, cache);
  if (missing.length === 0) return;
  const bytes = formatSize(missing.reduce((sum, { size }) => sum + size, 0));
  const isLocal = missing.some(({ digest }) => source.given[digest]?.blob !== undefined);
  process.stderr.write(
    isLocal
      ? `${source.name}: has no index yet: reading all of it (${bytes}) first\n`
      : `${source.name}: ${missing.length} of ${source.layers.length} layers (${bytes}) have no index here: those that ` +
          'nobody has published one for are downloaded and indexed first\n',
  );
}

function sentence({ source, mountPoint, layers }: MountRecord): string {
  const count = (index: MountRecord['layers'][number]['index']): number =>
    layers.filter((layer) => layer.index === index).length;
  const parts = [
    [count('none'), 'native'],
    [count('given'), 'by the index given'],
    [count('here'), 'by an index that was here'],
    [count('published'), 'by a published index'],
    [count('made'), 'indexed now'],
  ] as const;
  const said = parts.filter(([number]) => number > 0).map(([number, what]) => `${number} ${what}`);
  const all = layers.length === 1 ? '1 layer' : `${layers.length} layers`;
  return `${source} mounted on ${mountPoint}: ${all}, ${said.join(', ')}\n`;
}
