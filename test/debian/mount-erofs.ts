/**
 * mount.erofs, the reference for serving a tarindex with a zinfo. Debian's erofs-utils 1.9 is configured with it
 * (--enable-oci) but does not ship it: its package takes the programs of usr/bin alone. So it is compiled here, in a few
 * seconds, from Debian's source package, by a private gcc with the libraries of this system's suite.
 */
import { cp, mkdtemp, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { cacheDirectory, fetchSource, fetchWithDependencies } from './packages.js';

const BUILD_PACKAGES = ['gcc', 'libcurl4-openssl-dev', 'libjson-c-dev', 'zlib1g-dev', 'libnl-genl-3-dev'];

/** What ./configure --enable-oci finds on a Debian system, for what is compiled here: autotools would take a minute. */
const FOUND = `HAVE_COPY_FILE_RANGE HAVE_CURL_CURL_H HAVE_ENDIAN_H HAVE_FALLOCATE HAVE_FSTATFS HAVE_GETRANDOM
  HAVE_GETRLIMIT HAVE_GETTID HAVE_JSON_C_JSON_H HAVE_LGETXATTR HAVE_LIBCURL HAVE_LIBNL_GENL_3 HAVE_LINUX_FALLOC_H
  HAVE_LINUX_FS_H HAVE_LINUX_LOOP_H HAVE_LINUX_TYPES_H HAVE_LINUX_XATTR_H HAVE_LLISTXATTR HAVE_LSETXATTR HAVE_MEMRCHR
  HAVE_NETLINK_GENL_GENL_H HAVE_POSIX_FADVISE HAVE_PREAD64 HAVE_PTHREAD_H HAVE_PWRITE64 HAVE_PWRITEV HAVE_SENDFILE
  HAVE_STRUCT_STAT_ST_ATIM HAVE_SYSCONF HAVE_SYS_IOCTL_H HAVE_SYS_RANDOM_H HAVE_SYS_RESOURCE_H HAVE_SYS_SENDFILE_H
  HAVE_SYS_STATFS_H HAVE_SYS_SYSMACROS_H HAVE_SYS_XATTR_H HAVE_UNISTD_H HAVE_ZLIB
  EROFS_MT_ENABLED OCIEROFS_ENABLED`.split(/\s+/);

/** Files that the other build options add. */
const LEFT_OUT =
  /compressor_(lz4|lz4hc|liblzma|libdeflate|libzstd)\.c|backends\/(fanotify|ublk)\.c|remotes\/s3\.c/;

const FLAGS = ['-O1', '-w', '-pipe', '-DHAVE_CONFIG_H', '-include', 'config.h'];
const DEFINES = ['-D_GNU_SOURCE', '-DNDEBUG', '-D_LARGEFILE_SOURCE', '-D_FILE_OFFSET_BITS=64'];
const LIBRARIES = ['-lcurl', '-ljson-c', '-lz', '-lnl-genl-3', '-lnl-3', '-lpthread'];

/**
 * Makes mount.erofs ready; needs the network unless the cache has it.
 *
 * @returns program and first parameters that run it
 * @throws with what apt or the compiler said
 */
export async function mountErofs(): Promise<readonly [string, ...string[]]> {
  const roots = path.join(cacheDirectory(), 'roots');
  const [root, source] = [path.join(roots, 'mount-erofs'), path.join(roots, 'erofs-utils-source')];
  await fetchWithDependencies('system', root, BUILD_PACKAGES);
  await fetchSource('sid', source, 'erofs-utils');
  const [version = ''] = (await readFile(path.join(source, 'VERSION'), 'utf8')).split('\n');
  const program = path.join(root, `mount.erofs-${version}`);
  if ((await stat(program).catch(() => undefined)) === undefined)
    await compile(root, source, version, program);
  const triplet = `${process.arch === 'arm64' ? 'aarch64' : 'x86_64'}-linux-gnu`;
  const libraries = [`lib/${triplet}`, `usr/lib/${triplet}`].map((directory) => path.join(root, directory));
  // With the C library it was compiled for.
  return [await loaderOf(root), '--library-path', libraries.join(':'), program];
}

async function loaderOf(root: string): Promise<string> {
  const name = process.arch === 'arm64' ? 'lib/ld-linux-aarch64.so.1' : 'lib64/ld-linux-x86-64.so.2';
  for (const candidate of [path.join(root, name), path.join(root, 'usr', name)])
    if (await stat(candidate).catch(() => undefined)) return candidate;
  throw new Error(`${root} has no ${name}`);
}

/** In a directory of its own inside the root, so that two may compile at once. */
async function compile(root: string, source: string, version: string, program: string): Promise<void> {
  const directory = await mkdtemp(path.join(root, 'build-'));
  try {
    for (const part of ['include', 'lib', 'mount']) {
      await cp(path.join(source, part), path.join(directory, part), { recursive: true });
    }
    const settings = [
      ...FOUND.map((name) => `#define ${name} 1`),
      `#define PACKAGE_VERSION ${JSON.stringify(version)}`,
      '#define EROFS_MAX_BLOCK_SIZE 4096',
      '',
    ];
    await writeFile(path.join(directory, 'include', 'config.h'), settings.join('\n'));
    const inside = `/${path.basename(directory)}`;
    const { stdout } = await execa('find', ['lib', 'mount', '-name', '*.c', '-printf', `${inside}/%p\\n`], {
      cwd: directory,
    });
    const files = stdout.split('\n').filter((file) => !LEFT_OUT.test(file));
    const includes = [`-I${inside}/include`, `-I${inside}/lib`, '-I/usr/include/libnl3'];
    const gcc = ['/usr/bin/gcc', ...FLAGS, ...DEFINES, ...includes, '-o', `${inside}/mount.erofs`, ...files];
    await execa('chroot', [root, ...gcc, ...LIBRARIES], { env: { TMPDIR: inside } });
    await rename(path.join(directory, 'mount.erofs'), program);
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}
