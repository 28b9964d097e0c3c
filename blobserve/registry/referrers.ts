/**
 * Lists of what refers to a manifest (distribution specification 1.1, "Listing Referrers"). Who may push to a repository may make
 * such a list as long as he likes, and a registry may send pages without end: pages and entries are bounded, and the time by the
 * caller's signal.
 */
import {
  type Descriptor,
  type ManifestDocument,
  ManifestError,
  MAX_INDEX_ENTRIES,
  MAX_MANIFEST_BYTES,
  parseManifest,
} from './manifest.js';
import type { Reference } from './reference.js';
import { RegistryError } from './registry-error.js';
import type { RepositoryRequest, RepositoryRequests } from './repository-requests.js';

const MAX_PAGES = 16;
/** What registries without the API answer. */
const NO_REFERRERS: ReadonlySet<number> = new Set([400, 404, 405]);

/**
 * @param digest of the manifest that is referred to
 * @returns undefined when the registry has no such API
 * @throws {RegistryError} also when the list has more than 4096 entries, more than 16 pages, or goes on elsewhere
 */
export async function listReferrers(
  requests: RepositoryRequests,
  reference: Reference,
  digest: string,
  artifactType: string,
  signal: AbortSignal | undefined,
): Promise<readonly Descriptor[] | undefined> {
  const object = `referrers of ${digest}`;
  const pageOf = (search: string): RepositoryRequest => ({
    reference,
    object,
    path: `referrers/${digest}${search}`,
    capability: 'referrers',
    headers: { accept: 'application/vnd.oci.image.index.v1+json', 'accept-encoding': 'identity' },
    signal,
  });
  const first = `?artifactType=${encodeURIComponent(artifactType)}`;
  try {
    return await requests.fromAny(pageOf(first), async (asked) => {
      const found: Descriptor[] = [];
      let search: string | undefined = first;
      for (let pages = 0; search !== undefined; pages++) {
        const response = await requests.get(pageOf(search), asked);
        const refuse = (reason: string): RegistryError =>
          new RegistryError(reason, {
            ...{ kind: 'invalid', host: response.url.host, repository: reference.repository, object },
          });
        if (pages === MAX_PAGES) {
          response.body.destroy();
          throw refuse(`its list has more than ${MAX_PAGES} pages: it is not used`);
        }
        const body = await requests.readBody(response, reference, object, MAX_MANIFEST_BYTES);
        const page = parsePage(body, response.header('content-type'), refuse);
        found.push(...(page.kind === 'index' ? page.index.manifests : []));
        if (found.length > MAX_INDEX_ENTRIES) {
          throw refuse(`its list has more than ${MAX_INDEX_ENTRIES} entries: it is not used`);
        }
        search = nextPage(response.header('link'), response.url, refuse);
      }
      return found;
    });
  } catch (error) {
    if (error instanceof RegistryError && NO_REFERRERS.has(error.status ?? 0)) return undefined;
    throw error;
  }
}

type Refuse = (reason: string) => RegistryError;

function parsePage(body: Buffer, contentType: string | undefined, refuse: Refuse): ManifestDocument {
  try {
    return parseManifest(body, contentType);
  } catch (error) {
    throw error instanceof ManifestError ? refuse(error.message) : error;
  }
}

/**
 * Where the list goes on: a query of the same place, since our credentials go along.
 *
 * @param link the header: `<…>; rel="next"`
 */
function nextPage(link: string | undefined, at: URL, refuse: Refuse): string | undefined {
  const target = /<([^<>]{0,4096})>\s*;[^,]{0,200}\brel="?next"?/i.exec(link ?? '')?.[1];
  if (target === undefined) return undefined;
  const next = URL.canParse(target, at.href) ? new URL(target, at) : undefined;
  if (next?.origin !== at.origin || next.pathname !== at.pathname || next.search === '') {
    throw refuse('its list goes on at another place: it is not used');
  }
  return next.search;
}
