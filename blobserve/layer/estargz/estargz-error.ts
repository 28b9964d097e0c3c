/** An eStargz layer whose footer or table of contents is damaged, lies, or says what cannot be served. */
export class EstargzError extends Error {
  override readonly name = 'EstargzError';
}
