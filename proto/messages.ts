/**
 * The generated messages, with 64-bit integers as JavaScript numbers. Import messages from this file only.
 */
import './integers.js';
import { containerd, erofs_nbd, google, runtime } from './gen/messages.js';

/** containerd.services.snapshots.v1 */
export import snapshots = containerd.services.snapshots.v1;
/** Of containerd's own services, what we call. */
export import content = containerd.services.content.v1;
export import images = containerd.services.images.v1;
export import containers = containerd.services.containers.v1;
export import leases = containerd.services.leases.v1;
export import diff = containerd.services.diff.v1;
export import version = containerd.services.version.v1;
/** Of CRI's image service, what we look at. */
export import cri = runtime.v1;
/** Our control API. */
export import control = erofs_nbd.control.v1;
export import types = containerd.types;
export import wellKnown = google.protobuf;
