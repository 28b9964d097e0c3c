import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach } from 'vitest';
import { openDatabase, type MetadataDatabase, type OpenOptions } from '../database.js';

const OPTIONS: OpenOptions = { address: '/run/test.sock', version: '0.0.0', patienceMs: 0 };

/** A root directory per test, with whatever was opened in it; both are gone afterwards. Call it at the top of a test file. */
export function temporaryRoots(): {
  root: () => string;
  open: (root: string, options?: Partial<OpenOptions>) => MetadataDatabase;
} {
  const roots: string[] = [];
  const databases: MetadataDatabase[] = [];
  afterEach(() => {
    for (const database of databases.splice(0)) database.close();
    for (const root of roots.splice(0)) rmSync(root, { recursive: true, force: true });
  });
  return {
    root: () => {
      const root = mkdtempSync(path.join(tmpdir(), 'metadata-'));
      roots.push(root);
      return root;
    },
    open: (root, options = {}) => {
      const database = openDatabase(root, { ...OPTIONS, ...options });
      databases.push(database);
      return database;
    },
  };
}
