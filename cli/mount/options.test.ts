import { describe, expect, it } from 'vitest';
import { MS_NOATIME, MS_NODEV, MS_NOSUID, MS_RDONLY } from '../../blobserve/linux/mount.js';
import { UsageError } from '../failure.js';
import { parseMountOptions } from './options.js';

const hex = 'ab'.repeat(32);

/** The message with which the words are refused. */
function refusal(...texts: string[]): string {
  try {
    parseMountOptions(texts);
  } catch (error) {
    expect(error).toBeInstanceOf(UsageError);
    return (error as Error).message;
  }
  throw new Error(`${texts.join(' ')} were taken`);
}

describe('the options of a mount', () => {
  it('are those of mount.erofs', () => {
    expect(
      parseMountOptions([
        `ro,oci.blob=sha256:${hex},oci.platform=linux/arm64`,
        'oci.username=anna,oci.password=a=b,oci.tarindex=/a b/index,oci.zinfo=z,oci.insecure,nodev',
      ]),
    ).toEqual({
      blob: `sha256:${hex}`,
      platform: expect.objectContaining({ os: 'linux', architecture: 'arm64' }) as unknown,
      username: 'anna',
      password: 'a=b',
      tarindex: '/a b/index',
      zinfo: 'z',
      insecure: true,
      flags: MS_RDONLY | MS_NODEV,
    });
    expect(parseMountOptions([])).toEqual({ insecure: false, flags: MS_RDONLY });
    expect(parseMountOptions([`oci.blob=${hex}`]).blob).toBe(`sha256:${hex}`);
    expect(parseMountOptions(['oci.layer=0']).layer).toBe(0);
  });

  it('take flags in their order, the last one wins', () => {
    expect(parseMountOptions(['nosuid,noatime,suid']).flags).toBe(MS_RDONLY | MS_NOATIME);
    expect(parseMountOptions(['suid', 'nosuid,defaults']).flags).toBe(MS_RDONLY | MS_NOSUID);
  });

  it('are refused by name when they do not parse', () => {
    expect(refusal('oci.layer=-1')).toContain('oci.layer=-1');
    expect(refusal('oci.layer=1x')).toContain('oci.layer=1x');
    expect(refusal('oci.layer=')).toBe('-o oci.layer: a value is missing');
    expect(refusal('oci.blob')).toBe('-o oci.blob: a value is missing');
    expect(refusal(`oci.blob=sha256:${hex.toUpperCase()}`)).toContain('oci.blob');
    expect(refusal('oci.platform=linux')).toContain('oci.platform=linux');
    expect(refusal('oci.insecure=yes')).toContain('oci.insecure');
    expect(refusal('oci.blobs=1')).toBe('-o oci.blobs: no such option');
    expect(refusal('s3.endpoint=x')).toContain('s3.endpoint');
    expect(refusal('toString')).toContain('toString');
    expect(refusal('ro=1')).toBe('-o ro: takes no value');
    expect(refusal('ro,rw')).toContain('-o rw');
  });

  it('are refused when they contradict each other', () => {
    expect(refusal(`oci.blob=${hex},oci.layer=1`)).toContain('oci.layer');
    expect(refusal('oci.layer=1', 'oci.layer=2')).toBe('-o oci.layer: given twice');
    expect(refusal('oci.username=anna')).toContain('oci.password');
    expect(refusal('oci.password=secret')).toBe('-o oci.password: needs oci.username too');
    expect(refusal('oci.username=a,oci.password=secret,oci.password_file=/x')).not.toContain('secret');
    expect(refusal('oci.zinfo=z')).toBe('-o oci.zinfo: needs oci.tarindex too');
  });
});
