/** What the doctor looked at, and what it found. */
export interface Finding {
  readonly area: 'kernel' | 'rights' | 'daemon' | 'containerd' | 'disk' | 'registry';
  /** What was looked at, in a few words. */
  readonly what: string;
  /** `warning`: it works, though not as well as it could. */
  readonly state: 'ok' | 'warning' | 'wrong' | 'skipped';
  readonly found: string;
  /** What to do about it; empty where nothing is wrong. */
  readonly advice: string;
}

type Look = (found: string, advice?: string) => Finding;

/** The ways a look at one thing can end. */
export function looking(
  area: Finding['area'],
  what: string,
): Readonly<Record<'ok' | 'skipped', (found: string) => Finding>> &
  Readonly<Record<'warning' | 'wrong', Look>> {
  const finding = (state: Finding['state']) => (found: string, advice?: string) => ({
    area,
    what,
    state,
    found,
    advice: advice ?? '',
  });
  return {
    ok: finding('ok'),
    skipped: finding('skipped'),
    warning: finding('warning'),
    wrong: finding('wrong'),
  };
}

/** The finding when looking itself fails. */
export async function guarded(
  area: Finding['area'],
  what: string,
  look: () => Promise<readonly Finding[]>,
): Promise<readonly Finding[]> {
  try {
    return await look();
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    return [looking(area, what).wrong(`cannot be looked at: ${message}`)];
  }
}
