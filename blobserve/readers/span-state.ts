/** What the store has of a span. */
export enum SpanState {
  Absent = 0,
  /** An earlier process marked it; not yet compared with its CRC-32 in this one. */
  Unchecked = 1,
  /** In the file, and right. */
  Ready = 2,
}
