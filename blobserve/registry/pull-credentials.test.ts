import { inspect } from 'node:util';
import { describe, expect, it } from 'vitest';
import { PasswordCredentials } from './credentials.js';
import { credentialsOfPull, placeOfPull, PullCredentials } from './pull-credentials.js';
import { parseReference } from './reference.js';

const place = placeOfPull(parseReference('registry.example:5000/team/app:1'));
const me = (password: string) => new PasswordCredentials('me', password);
const HOUR = 3_600_000;

function held() {
  const clock = { now: 0 };
  const pulls = new PullCredentials(() => clock.now);
  const shown = async ({ host, repository } = place) =>
    (await pulls.lookup(host, repository)).map((one) =>
      'identityToken' in one ? one.identityToken : one.password,
    );
  return { clock, pulls, shown };
}

describe('credentials of pulls', () => {
  it('are for the repository that was pulled, and no other', async () => {
    const { pulls, shown } = held();
    pulls.remember(place, me('one'), HOUR);
    expect(await shown()).toEqual(['one']);
    expect(await shown({ ...place, host: 'Registry.example:5000' })).toEqual(['one']);
    expect(await shown({ ...place, host: 'registry.example' })).toEqual([]);
    expect(await shown({ ...place, repository: 'team/other' })).toEqual([]);
  });

  it('are kept for a time after the last pull, several of them, the newest first, not without end', async () => {
    const { clock, pulls, shown } = held();
    pulls.remember(place, me('one'), HOUR);
    clock.now += HOUR / 2;
    pulls.remember(place, me('two'), HOUR);
    expect(await shown()).toEqual(['two', 'one']);
    clock.now += HOUR / 2;
    expect(await shown()).toEqual(['two']);
    pulls.remember(place, me('two'), HOUR);
    clock.now += HOUR / 2;
    expect(await shown()).toEqual(['two']);
    for (let i = 0; i < 20; i++) pulls.remember(place, me(`many ${i}`), HOUR);
    expect(await shown()).toHaveLength(8);
    for (let i = 0; i < 1001; i++) pulls.remember({ host: 'h', repository: `r${i}` }, me('x'), HOUR);
    expect(await shown()).toEqual([]);
    expect(pulls.messages()).toHaveLength(1000);
  });

  it('that a pull failed with are forgotten, unless one has succeeded', async () => {
    const { pulls, shown } = held();
    pulls.remember(place, me('right'), HOUR);
    pulls.remember(place, me('right'), HOUR, true);
    pulls.remember(place, me('wrong'), HOUR);
    pulls.refuse(place, me('wrong'));
    pulls.remember(place, me('right'), HOUR);
    pulls.refuse(place, me('right'));
    expect(await shown()).toEqual(['right']);
  });

  it('are handed on to another process with the time they have left', async () => {
    const { clock, pulls } = held();
    pulls.remember(place, me('one'), HOUR, true);
    clock.now += HOUR / 4;
    pulls.remember(place, me('two'), HOUR);
    const next = held();
    next.clock.now = 1_000_000_000;
    for (const message of pulls.messages()) next.pulls.take(message);
    expect(await next.shown()).toEqual(['two', 'one']);
    expect(next.pulls.messages()).toEqual(pulls.messages());
    next.clock.now += 0.75 * HOUR;
    expect(await next.shown()).toEqual(['two']);
    next.pulls.take({ ...place, credentials: [] });
    expect(next.pulls.messages()).toEqual([]);
  });

  it('are shown by nobody who prints them', async () => {
    const { pulls } = held();
    pulls.remember(place, me('s3cret'), HOUR);
    const found = await pulls.lookup(place.host, place.repository);
    for (const one of [pulls, found]) {
      expect(inspect(one, { depth: 9, showHidden: true })).not.toContain('s3cret');
      expect(JSON.stringify(one)).not.toContain('s3cret');
    }
  });
});

describe('the AuthConfig of a pull', () => {
  const hub = placeOfPull(parseReference('busybox'));
  const base64 = (text: string) => Buffer.from(text).toString('base64');

  it.each<[Parameters<typeof credentialsOfPull>[0], unknown]>([
    [{ username: 'me', password: 'p', identityToken: 'i', auth: base64('a:b') }, ['me', 'p']],
    [{ identityToken: 'i', auth: base64('a:b') }, 'i'],
    [{ auth: base64('me:p:w\0\0') }, ['me', 'p:w']],
    [{ auth: base64('nobody') }, undefined],
    [{ auth: 'not base64' }, undefined],
    [{ registryToken: 'r' }, undefined],
    [{ username: 'me', password: 'p', serverAddress: 'https://index.docker.io/v1/' }, ['me', 'p']],
    [{ username: 'me', password: 'p', serverAddress: 'registry.example' }, undefined],
    [{ username: 'me', password: 'p'.repeat(20_000) }, undefined],
    [{}, undefined],
    [undefined, undefined],
  ])('%j is %j', (auth, expected) => {
    const found = credentialsOfPull(auth, hub);
    expect(
      found && ('identityToken' in found ? found.identityToken : [found.username, found.password]),
    ).toEqual(expected);
  });
});
