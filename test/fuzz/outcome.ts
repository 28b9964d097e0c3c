/** What came of hostile input: a value, or a refusal of one of the kinds that are meant. Everything else is a finding. */
export type Outcome<T> = { readonly value: T } | { readonly refused: string };

type Refusal = abstract new (...parameters: never[]) => Error;

function settle(error: unknown, refusals: readonly Refusal[]): { refused: string } {
  if (error instanceof Error && refusals.some((kind) => error instanceof kind)) {
    if (error.message === '') throw new Finding(`a ${error.name} without a message`);
    return { refused: error.message };
  }
  throw error;
}

/** Something that must never happen did. */
export class Finding extends Error {
  override readonly name = 'Finding';
}

export function attempt<T>(run: () => T, ...refusals: readonly Refusal[]): Outcome<T> {
  try {
    return { value: run() };
  } catch (error) {
    return settle(error, refusals);
  }
}

export async function attemptAsync<T>(
  run: () => Promise<T>,
  ...refusals: readonly Refusal[]
): Promise<Outcome<T>> {
  try {
    return { value: await run() };
  } catch (error) {
    return settle(error, refusals);
  }
}

/** @throws {Finding} unless it holds */
export function must(holds: boolean, what: string): asserts holds {
  if (!holds) throw new Finding(what);
}
