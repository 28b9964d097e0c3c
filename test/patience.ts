/**
 * How long tests wait. On a machine that emulates every instruction the same work takes ten times as long:
 * `EROFS_NBD_SLOW=10` multiplies what tests wait for, never what the product does.
 */
const factor = Number(process.env['EROFS_NBD_SLOW'] || 1);
if (!(factor >= 1))
  throw new Error(`EROFS_NBD_SLOW=${process.env['EROFS_NBD_SLOW']}: wanted a number of at least 1`);

/** @param milliseconds what is enough on an ordinary machine */
export function patience(milliseconds: number): number {
  return milliseconds * factor;
}
