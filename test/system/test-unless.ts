import { it } from 'vitest';

/** `it` of tests that are skipped, with the reason, where something is missing. */
export function testUnless(missing: string | undefined): (name: string, body: () => Promise<void>) => void {
  return (name, body) =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });
}
