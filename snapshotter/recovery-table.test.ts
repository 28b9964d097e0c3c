import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { mountState, outcomeOf, type LayerState, type Outcome, RECOVERY_TABLE } from './recovery-table.js';

const VALUES: { readonly [K in keyof LayerState]: readonly LayerState[K][] } = {
  used: [true, false],
  row: ['none', 'attaching', 'attached', 'mounted', 'detaching'],
  boot: ['this', 'earlier'],
  device: ['served', 'kept', 'gone'],
  mount: ['none', 'own', 'stale', 'foreign'],
};

function everyState(): LayerState[] {
  let states: Partial<LayerState>[] = [{}];
  for (const [key, values] of Object.entries(VALUES)) {
    states = states.flatMap((state) => values.map((value) => ({ ...state, [key]: value })));
  }
  return states as LayerState[];
}

/** The table of docs/recovery.md: patterns by column, and the outcome. */
function documented(): { when: Map<string, string>; outcome: string }[] {
  const text = readFileSync(new URL('../docs/recovery.md', import.meta.url), 'utf8');
  const lines = text.split('\n');
  const header = lines.findIndex((line) => line.startsWith('| used by a snapshot |'));
  const keys = ['used', 'row', 'boot', 'device', 'mount'];
  const rules = [];
  for (const line of lines.slice(header + 2)) {
    if (!line.startsWith('|')) break;
    const cells = line
      .split('|')
      .slice(1, -1)
      .map((cell) => cell.trim());
    rules.push({
      when: new Map(keys.map((key, index) => [key, cells[index] ?? ''])),
      outcome: cells[5] ?? '',
    });
  }
  return rules;
}

function documentedOutcome(state: LayerState): string | undefined {
  const words = new Map<string, string>([...Object.entries({ ...state, used: state.used ? 'yes' : 'no' })]);
  return documented().find(({ when }) =>
    [...when].every(([key, cell]) => cell === 'any' || cell.split(', ').includes(words.get(key) ?? '')),
  )?.outcome;
}

describe('the recovery table', () => {
  it('has an outcome for every combination, and the documents say the same', () => {
    const states = everyState();
    expect(states).toHaveLength(2 * 5 * 2 * 3 * 4);
    expect(documented()).toHaveLength(RECOVERY_TABLE.length);
    for (const state of states) expect([state, documentedOutcome(state)]).toEqual([state, outcomeOf(state)]);
  });

  it('has no line that never applies', () => {
    const states = everyState();
    for (const { when, outcome } of RECOVERY_TABLE) {
      const without = RECOVERY_TABLE.filter((rule) => rule.when !== when);
      const changes = states.some((state) => {
        const other = without.find((rule) =>
          (Object.keys(rule.when) as (keyof LayerState)[]).every((key) =>
            (rule.when[key] as readonly unknown[]).includes(state[key]),
          ),
        );
        return outcomeOf(state) === outcome && other?.outcome !== outcome;
      });
      expect([when, changes]).toEqual([when, true]);
    }
  });

  it('takes nothing from a layer in use but what is dead', () => {
    for (const state of everyState().filter(({ used }) => used)) {
      const outcome = outcomeOf(state);
      expect(outcome).not.toBe('clean up');
      if (state.mount === 'own' && state.device !== 'gone') expect(['adopt', 'reconnect']).toContain(outcome);
    }
  });

  it('leaves nothing of a layer that nobody uses', () => {
    for (const state of everyState().filter(({ used }) => !used)) {
      const expected: Outcome[] =
        state.row === 'none' && state.mount === 'none' && state.device !== 'served'
          ? ['nothing']
          : ['clean up'];
      expect(expected).toContain(outcomeOf(state));
    }
  });

  it('knows its own mounts from others', () => {
    expect(mountState(undefined, '/dev/nbd0')).toBe('none');
    expect(mountState({ type: 'erofs', source: '/dev/nbd0' }, '/dev/nbd0')).toBe('own');
    expect(mountState({ type: 'erofs', source: '/dev/nbd1' }, '/dev/nbd0')).toBe('stale');
    expect(mountState({ type: 'erofs', source: '/dev/nbd1' }, null)).toBe('stale');
    expect(mountState({ type: 'tmpfs', source: 'none' }, null)).toBe('foreign');
  });
});
