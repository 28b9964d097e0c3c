/**
 * Names of an image, over all its layers as overlayfs stacks them: the topmost layer that has a name decides, whiteouts hide,
 * opaque directories end what is below them, symbolic links are followed inside the image.
 */
import type { ErofsFile, ErofsTree } from '../layer/erofs/tree-reader.js';
import { MODE } from '../layer/tree.js';

/** A file of one layer. */
export interface ImageFile {
  /** Of the layers given, the topmost being 0. */
  readonly layer: number;
  readonly file: ErofsFile;
  /** Without symbolic links; bytes as a latin1 string. */
  readonly path: string;
}

/** One directory as overlayfs shows it: those of the layers, the topmost first. */
type MergedDirectory = readonly { readonly layer: number; readonly file: ErofsFile }[];

type Found =
  { readonly directory: MergedDirectory } | { readonly layer: number; readonly file: ErofsFile } | undefined;

/** As in Linux, MAXSYMLINKS. */
const LINKS_MAX = 40;
/** Names in one path, links' targets included. */
const STEPS_MAX = 256;

export class ImageTree {
  /** @param layers the topmost first */
  constructor(private readonly layers: readonly ErofsTree[]) {}

  /**
   * @param path absolute, or taken from the root; bytes as a latin1 string
   * @returns undefined when there is no regular file, or a chain of links that is too long
   * @throws {ErofsFormatError} a layer is not what it should be, and whatever its reader throws
   */
  async regularFile(path: string): Promise<ImageFile | undefined> {
    const names = path.split('/');
    const above: { readonly name: string; readonly directory: MergedDirectory }[] = [];
    let here = await this.#root();
    let links = 0;
    for (let steps = 0; steps < STEPS_MAX; steps++) {
      const name = names.shift();
      if (name === undefined) return undefined;
      if (name === '' || name === '.') continue;
      if (name === '..') {
        above.pop();
        here = above.at(-1)?.directory ?? (await this.#root());
        continue;
      }
      const found = await this.#step(here, name);
      if (found === undefined) return undefined;
      if ('directory' in found) {
        here = found.directory;
        above.push({ name, directory: here });
        continue;
      }
      const { layer, file } = found;
      const type = file.mode & MODE.FORMAT;
      if (type === MODE.SYMLINK) {
        const target = await this.tree(layer).readLink(file);
        if (++links > LINKS_MAX) return undefined;
        names.unshift(...target.split('/'));
        if (!target.startsWith('/')) continue;
        above.length = 0;
        here = await this.#root();
        continue;
      }
      const isLast = names.every((rest) => rest === '');
      if (type !== MODE.FILE || !isLast) return undefined;
      return { layer, file, path: `/${[...above.map((one) => one.name), name].join('/')}` };
    }
    return undefined;
  }

  tree(layer: number): ErofsTree {
    const tree = this.layers[layer];
    if (tree === undefined) throw new RangeError(`layer ${layer} of ${this.layers.length}`);
    return tree;
  }

  async #root(): Promise<MergedDirectory> {
    const roots = await Promise.all(this.layers.map((tree) => tree.root()));
    return this.#visible(roots.map((file, layer) => ({ layer, file })));
  }

  async #step(directory: MergedDirectory, name: string): Promise<Found> {
    const all = await Promise.all(
      directory.map(async ({ layer, file }) => ({ layer, file: await this.tree(layer).lookup(file, name) })),
    );
    const there = all.flatMap(({ layer, file }) => (file === undefined ? [] : [{ layer, file }]));
    const [first] = there;
    if (first === undefined || first.file.isWhiteout) return undefined;
    if (!isDirectory(first.file)) return first;
    const end = there.findIndex(({ file }) => !isDirectory(file));
    return { directory: await this.#visible(end < 0 ? there : there.slice(0, end)) };
  }

  /** What an opaque directory is above of is not seen. */
  async #visible(directory: MergedDirectory): Promise<MergedDirectory> {
    for (const [index, { layer, file }] of directory.slice(0, -1).entries()) {
      if (await this.tree(layer).isOpaque(file)) return directory.slice(0, index + 1);
    }
    return directory;
  }
}

function isDirectory({ mode }: ErofsFile): boolean {
  return (mode & MODE.FORMAT) === MODE.DIRECTORY;
}
