/** The thread that makes indexes from published artifacts, which is started from the build. */
import { existsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { ArtifactImporter } from '../blobserve/published/artifact-importer.js';
import type { ArtifactImport } from '../blobserve/published/artifact-import.js';

const program = new URL('../dist/blobserve/published/artifact-thread.js', import.meta.url);
const wanted = (digest: string): ArtifactImport =>
  ({
    files: {},
    record: { digest: 'sha256:other', blobSize: 1 },
    digest,
    size: 1,
  }) as unknown as ArtifactImport;

describe.skipIf(!existsSync(program))('the importer of artifacts', () => {
  it('asks one thread for all, and each is told what is wrong with his own', async () => {
    const importer = new ArtifactImporter(program);
    importer.expect();
    const runs = ['sha256:a', 'sha256:b'].map((digest) => importer.run(wanted(digest)));
    const reasons = await Promise.all(runs.map((run) => run.catch((error: unknown) => String(error))));
    expect(reasons[0]).toMatch(/it is of layer sha256:other of 1 bytes, not sha256:a/);
    expect(reasons[1]).toMatch(/not sha256:b/);
  });

  it('tells all who wait when the thread fails, and starts another for the next', async () => {
    const broken = new URL(
      `data:text/javascript,${encodeURIComponent(
        "import { parentPort } from 'node:worker_threads';" +
          "parentPort.on('message', () => process.exit(3)); parentPort.postMessage({ ready: true });",
      )}`,
    );
    const importer = new ArtifactImporter(broken);
    const runs = [importer.run(wanted('sha256:a')), importer.run(wanted('sha256:b'))];
    for (const run of runs) await expect(run).rejects.toThrow('its thread ended with 3');
    await expect(importer.run(wanted('sha256:c'))).rejects.toThrow('its thread ended with 3');
  });
});
