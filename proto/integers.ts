/**
 * Makes 64-bit integers JavaScript numbers. Imported before the generated messages, which look at this when they are loaded
 * (for the defaults of absent fields) as well as when they decode.
 *
 * Every 64-bit field of both APIs is a size, a count, a time in seconds or a row number: all below 2^53. protobuf.js
 * would make `Long` objects of them whenever the package `long` happens to be installed (@grpc/grpc-js brings it).
 */
import protobuf from 'protobufjs/minimal.js';

// The typings demand a constructor; the library itself tests for truth (`util.Long ? … : number`).
(protobuf.util as { Long: unknown }).Long = null;
protobuf.configure();
