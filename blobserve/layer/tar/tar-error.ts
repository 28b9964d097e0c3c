/** A tar stream that cannot be read as one: where it goes wrong and why. */
export class TarError extends Error {
  override readonly name = 'TarError';

  /**
   * @param offset byte in the tar stream where the trouble starts: a header block, a pax record, the end of the stream
   * @param reason what is wrong there, with the numbers
   */
  constructor(
    readonly offset: number,
    readonly reason: string,
  ) {
    super(`tar at offset ${offset}: ${reason}`);
  }
}

/** Bytes of a name for a message: printable ASCII as it is, the rest as \xNN, long names cut. */
export function showName(name: string): string {
  const cut = name.length > 120 ? `${name.slice(0, 120)}…(${name.length} bytes)` : name;
  return `'${cut.replace(/[^\x20-\x7e…]/g, (char) => `\\x${char.charCodeAt(0).toString(16).padStart(2, '0')}`)}'`;
}
