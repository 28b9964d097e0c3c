/**
 * The generated messages, with 64-bit integers as JavaScript numbers. Import messages from this file only.
 *
 * Every 64-bit field of both APIs is a size, a count, a time in seconds or a row number: all below 2^53. protobuf.js
 * would decode them into `Long` objects whenever the package `long` happens to be installed (@grpc/grpc-js brings it),
 * so it is switched off here, before the first message is decoded.
 */
import protobuf from 'protobufjs/minimal.js';
import { containerd, erofs_nbd, google } from './gen/messages.js';

// The typings demand a constructor; the library itself tests for truth (`util.Long ? … : number`).
(protobuf.util as { Long: unknown }).Long = null;
protobuf.configure();

/** containerd.services.snapshots.v1 */
export import snapshots = containerd.services.snapshots.v1;
/** Our control API. */
export import control = erofs_nbd.control.v1;
export import types = containerd.types;
export import wellKnown = google.protobuf;
