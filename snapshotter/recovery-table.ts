/**
 * What becomes of a layer, by what is found of it: the one table that starts and first uses go by.
 *
 * The row says what may exist, never what does: that is asked of the kernel and of the data plane. So a row's state
 * matters only where nothing else is found. docs/recovery.md has the same table for people; a test compares the two.
 */

/** What is found of a layer. */
export interface LayerState {
  /** Whether a snapshot is made of it. */
  readonly used: boolean;
  /** State of its row in `devices`. */
  readonly row: 'none' | 'attaching' | 'attached' | 'mounted' | 'detaching';
  /** Which boot the row was written in; a layer without one counts as of an earlier boot. */
  readonly boot: 'this' | 'earlier';
  /**
   * `served`: the running data plane has it. `kept`: it has not, but the kernel still has the device (nbd, by our
   * identifier) or the connection that its file is on (fuse). `gone`: neither.
   */
  readonly device: 'served' | 'kept' | 'gone';
  /**
   * On the layer's directory. `own`: EROFS from its device. `stale`: EROFS from another device, which was ours once.
   * `foreign`: something that is no EROFS, so not made by us.
   */
  readonly mount: 'none' | 'own' | 'stale' | 'foreign';
}

export type Outcome =
  /** There is nothing, and nothing is wanted. */
  | 'nothing'
  /** All is in place: nothing is done. */
  | 'adopt'
  /** The data plane gets the device that the kernel kept; the mount goes on, and so do its readers. */
  | 'reconnect'
  /** The device is made, or taken over, and mounted. */
  | 'attach'
  /** The same, at once or when it is wanted first: `recovery.attach`. */
  | 'attach later'
  /** The mount is dead: it is unmounted lazily, then as `attach`. */
  | 'replace'
  /** Unmounted, detached, its directory and its rows deleted. */
  | 'clean up'
  /** Somebody else's: nothing is touched, calls that need the layer fail and say what is in the way. */
  | 'leave alone';

type Pattern = { readonly [K in keyof LayerState]?: readonly LayerState[K][] };

export interface Rule {
  readonly when: Pattern;
  readonly outcome: Outcome;
}

/** The first rule that fits applies; what a rule does not name may be anything. */
export const RECOVERY_TABLE: readonly Rule[] = [
  { when: { used: [false], row: ['none'], device: ['gone', 'kept'], mount: ['none'] }, outcome: 'nothing' },
  { when: { used: [false] }, outcome: 'clean up' },
  { when: { mount: ['foreign'] }, outcome: 'leave alone' },
  { when: { mount: ['stale'] }, outcome: 'replace' },
  { when: { mount: ['own'], device: ['gone'] }, outcome: 'replace' },
  { when: { mount: ['own'], device: ['served'] }, outcome: 'adopt' },
  { when: { mount: ['own'], device: ['kept'] }, outcome: 'reconnect' },
  { when: { mount: ['none'], device: ['served'] }, outcome: 'attach' },
  { when: { mount: ['none'], row: ['none'] }, outcome: 'attach later' },
  { when: { mount: ['none'], boot: ['earlier'] }, outcome: 'attach later' },
  { when: { mount: ['none'] }, outcome: 'attach' },
];

function fits(when: Pattern, state: LayerState): boolean {
  return (Object.keys(when) as (keyof LayerState)[]).every((key) =>
    (when[key] as readonly unknown[]).includes(state[key]),
  );
}

/** Every combination has an outcome. */
export function outcomeOf(state: LayerState): Outcome {
  const rule = RECOVERY_TABLE.find(({ when }) => fits(when, state));
  if (rule === undefined) throw new Error(`no rule for ${JSON.stringify(state)}`);
  return rule.outcome;
}

/** What is mounted on a layer's directory, seen from its device. */
export function mountState(
  mount: { readonly type: string; readonly source: string } | undefined,
  devicePath: string | null,
): LayerState['mount'] {
  if (mount === undefined) return 'none';
  if (mount.type !== 'erofs') return 'foreign';
  return mount.source === devicePath ? 'own' : 'stale';
}
