#!/bin/bash
# Runs in the test machine: npm run test:systemd with nbd. systemd.sh DIRECTORY, in which everything was prepared outside.
set -uo pipefail

echo "kernel $(uname -r), $(nproc) CPUs, emulated"
ROOT=/run/w
truncate -s "${WORK_SIZE:-2G}" /dev/shm/work.img &&
  mkfs.ext4 -q -F -O ^has_journal /dev/shm/work.img &&
  mkdir -p "$ROOT" && mount -o loop /dev/shm/work.img "$ROOT" && mkdir "$ROOT/t" || {
  echo "no file system for the tests" >&2
  exit 1
}
export EROFS_NBD_TEST_ROOT=$ROOT/t EROFS_NBD_EXPECT_ATTACH=nbd EROFS_NBD_SLOW=${EROFS_NBD_SLOW:-6} TMPDIR=$ROOT
exec node --enable-source-maps dist/test/systemd/main.js --prepared "$1" 2>&1
