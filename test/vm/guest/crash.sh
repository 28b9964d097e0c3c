#!/bin/bash
# Runs in the test machine: kills daemons under a container that reads over nbd. crash.sh [ARGUMENT of test:crash...]
set -uo pipefail

echo "kernel $(uname -r), $(nproc) CPUs, emulated"
ROOT=/run/w
truncate -s "${WORK_SIZE:-1800M}" /dev/shm/work.img &&
  mkfs.ext4 -q -F -O ^has_journal /dev/shm/work.img &&
  mkdir -p "$ROOT" && mount -o loop /dev/shm/work.img "$ROOT" || {
  echo "no file system for the tests" >&2
  exit 1
}
mkdir "$ROOT"/{logs,t}
export EROFS_NBD_TEST_ROOT=$ROOT/t EROFS_NBD_TEST_LOGS=$ROOT/logs EROFS_NBD_EXPECT_ATTACH=nbd
export EROFS_NBD_SLOW=${EROFS_NBD_SLOW:-6} TMPDIR=$ROOT

node --enable-source-maps dist/test/crash/main.js "$@" 2>&1 | tee "$ROOT/output"
status=${PIPESTATUS[0]}
if [ $status -ne 0 ]; then
  for log in "$ROOT"/logs/*.log; do
    [ -s "$log" ] || continue
    echo "== $log"
    grep -v '"level":"debug"' "$log" | tail -n 80 | cut -c 1-500
  done
  echo "== kernel"
  dmesg | tail -n 30
  # The last line of all has the counts.
  tail -n 1 "$ROOT/output"
fi
exit $status
