import { describe, expect, it } from 'vitest';
import { begunBy, interpreterOf, startCommand } from './start-command.js';

describe('startCommand', () => {
  it('is the entrypoint and the command, with where programs are looked for', () => {
    const config = {
      Entrypoint: ['/e', '-x'],
      Cmd: ['run'],
      Env: ['PATH=/a:b:/c', 'LD_LIBRARY_PATH=/l'],
      WorkingDir: '/w/',
    };
    expect(startCommand({ config })).toEqual({
      words: ['/e', '-x', 'run'],
      command: ['run'],
      searchPath: ['/a', '/c'],
      libraryPath: ['/l'],
      workingDirectory: '/w/',
    });
  });

  it('has defaults for what an image does not say, and none for what to run', () => {
    expect(startCommand({ config: { Cmd: ['sh'], Entrypoint: null } })).toMatchObject({
      words: ['sh'],
      command: [],
      workingDirectory: '/',
    });
    for (const body of [
      undefined,
      null,
      7,
      [],
      {},
      { config: null },
      { config: { Cmd: [] } },
      { config: { Cmd: 'sh' } },
    ]) {
      expect(startCommand(body)).toBeUndefined();
    }
  });

  it('takes no more than so much of anything', () => {
    const command = startCommand({
      config: { Cmd: Array.from({ length: 1000 }, () => 'x'.repeat(10_000)) },
    });
    expect(command?.words.length).toBe(64);
    expect(command?.words[0]?.length).toBe(4096);
  });
});

describe('begunBy', () => {
  it.each([
    [
      ['/bin/sh', '-c', 'exec foo --bar'],
      ['foo', '--bar'],
    ],
    [
      ['bash', '-lc', 'A=1 B=2 "foo" x; rm y'],
      ['foo', 'x'],
    ],
    [['sh', '-c', '/app/run && true'], ['/app/run']],
    [['sh', '-c', '$COMMAND'], []],
    [['sh', '-c'], []],
    [['sh', '/script'], []],
    [
      ['/usr/bin/env', '-i', 'A=b', 'node', 'x'],
      ['node', 'x'],
    ],
    [
      ['/usr/bin/env', '-S', 'node --flag', 'x'],
      ['node', '--flag', 'x'],
    ],
    [
      ['/usr/bin/env', '-Snode --flag', 'x'],
      ['node', '--flag', 'x'],
    ],
    [
      ['tini', '--', 'redis', 'a'],
      ['redis', 'a'],
    ],
    [['python3', '/app.py'], []],
    [[], []],
  ])('%j is followed by %j', (words, next) => {
    expect(begunBy(words)).toEqual(next);
  });
});

describe('interpreterOf', () => {
  it.each([
    ['#!/bin/sh\necho', ['/bin/sh']],
    ['#! /usr/bin/env  python3 -u \n', ['/usr/bin/env', 'python3 -u']],
    ['#!\n', undefined],
    ['echo', undefined],
    ['', undefined],
  ])('of %j is %j', (text, words) => {
    expect(interpreterOf(Buffer.from(text))).toEqual(words);
  });
});
