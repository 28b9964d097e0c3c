#!/bin/bash
# Runs containerd's suite for snapshotters (npm run conformance) in the test machine, with the nbd backend; started by
# test/vm/test-vm.sh from the root of the checkout, which has compiled the Go programs. A short run, or with
# --whole all of it, as outside. Ends with its line of JSON.
set -euo pipefail

# A file system such as users have, on which overlays can be mounted: the machine's own root is one.
mkdir -p /run/c
truncate -s 1G /dev/shm/conformance.img
mkfs.ext4 -q -F -O ^has_journal /dev/shm/conformance.img
mount -o loop /dev/shm/conformance.img /run/c

echo "kernel $(uname -r)"
export EROFS_NBD_TEST_ROOT=/run/c EROFS_NBD_EXPECT_ATTACH=nbd EROFS_NBD_SLOW=${EROFS_NBD_SLOW:-6}
length=--short
[ "${1:-}" != --whole ] || length=
exec node --enable-source-maps dist/test/conformance/main.js $length
