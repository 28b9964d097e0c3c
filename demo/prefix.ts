/** First part of the names of private directories, by which an abandoned one is known. */
export const PREFIX = 'erofs-nbd-demo';
