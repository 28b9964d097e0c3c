import { defineConfig } from 'vitest/config';
import { patience } from './test/patience.js';

export default defineConfig({
  test: {
    // Native modules (better-sqlite3, koffi) and descriptors do not mix with worker threads that vitest tears down.
    pool: 'forks',
    testTimeout: patience(30_000),
    hookTimeout: patience(60_000),
    expect: { poll: { timeout: patience(1000) } },
    projects: [
      {
        extends: true,
        test: {
          name: 'unit',
          sequence: { groupOrder: 0 },
          include: ['{daemon,proto,metadata,snapshotter,blobserve,cli}/**/*.test.ts'],
        },
      },
      {
        extends: true,
        test: {
          name: 'integration',
          include: ['test/**/*.test.ts'],
          // Real daemons, mounts and ports: one file after the other.
          poolOptions: { forks: { singleFork: true } },
          // After the unit tests, which use every core.
          sequence: { groupOrder: 1 },
          // What is polled for ends well sooner or later; how soon is the machine's affair.
          expect: { poll: { timeout: patience(30_000) } },
          testTimeout: patience(180_000),
          hookTimeout: patience(300_000),
        },
      },
    ],
  },
});
