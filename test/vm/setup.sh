#!/bin/bash
# Gets what test/vm/run.sh needs into ${EROFS_NBD_CACHE:-~/.cache/erofs-nbd}/vm: QEMU >= 10 with all its libraries, a
# static busybox, and a Debian 6.12 kernel, or with VM_KERNEL=SUITE that suite's. Nothing is installed. Quick when everything
# is there; about 250 MB are downloaded when not. Remove the directory to take newer versions; EROFS_NBD_VM_SUITE names
# another Debian suite for all of it.
set -euo pipefail

HERE=$(dirname -- "$(realpath -- "$0")")
VM=$(realpath -m -- "${EROFS_NBD_CACHE:-$HOME/.cache/erofs-nbd}")/vm

# QEMU's version matters more than anything else: the TCG of 7.2, which bookworm itself has, makes 6.12 guests panic.
# The kernel must be a generic one (the cloud flavour has no 9p).
case $(. /etc/os-release && echo "${VERSION_CODENAME:-}") in
  bookworm) SUITE=bookworm-backports ;;
  *) SUITE=trixie ;;
esac
SUITE=${EROFS_NBD_VM_SUITE:-$SUITE}

mkdir -p "$VM"
fetch() { "$HERE/../debian/fetch-packages.sh" --with-dependencies "$SUITE" "$@"; }
fetch "$VM/tools" qemu-system-x86 busybox-static xz-utils zstd
case ${VM_KERNEL:-} in
  '') fetch "$VM/kernel" linux-image-amd64 ;;
  # Another suite's, for instance sid's: unpacked, not installed, so that it need not fit the rest.
  *) SUITE=$VM_KERNEL fetch "$VM/kernel-$VM_KERNEL" linux-image-amd64 ;;
esac
