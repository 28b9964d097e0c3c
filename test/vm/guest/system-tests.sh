#!/bin/bash
# Runs in the test machine, started by test/vm/test-vm.sh from the root of the checkout: the checks of the nbd devices,
# then the tests of the whole path with nbd. Each prints its results as it goes; the status is 0 when nothing failed.
set -uo pipefail

echo "kernel $(uname -r)"
status=0

# A file system such as users have, where the stack's private directories are: the machine's own root is an overlay, on
# which no overlay can be mounted, and tmpfs knows no reads that do not wait.
ROOT=/run/w
truncate -s "${WORK_SIZE:-2G}" /dev/shm/work.img &&
  mkfs.ext4 -q -F -O ^has_journal /dev/shm/work.img &&
  mkdir -p "$ROOT" && mount -o loop /dev/shm/work.img "$ROOT" || {
  echo "no file system for the tests" >&2
  exit 1
}
mkdir "$ROOT"/{logs,t}
export EROFS_NBD_TEST_ROOT=$ROOT/t EROFS_NBD_TEST_LOGS=$ROOT/logs
export EROFS_NBD_EXPECT_ATTACH=nbd EROFS_NBD_SLOW=${EROFS_NBD_SLOW:-6}

if [ "${DEVICES:-yes}" = yes ]; then
  echo "== devices, $((SECONDS)) s"
  node dist/test/vm/guest/nbd-device.js || status=1
fi

echo "== system, $((SECONDS)) s"
# Tests that hang do not keep the logs from being shown.
timeout -k 10 "${SYSTEM_TIMEOUT:-900}" node_modules/.bin/vitest run --project integration --no-color \
  --reporter=verbose --reporter=./test/reporter.ts "$@" || {
  status=1
  for log in "$ROOT"/logs/*.log "$ROOT"/t/*/*.log; do
    [ -s "$log" ] || continue
    echo "== $log"
    tail -n 60 "$log" | cut -c 1-600
  done
  echo "== kernel"
  dmesg | tail -n 30
}
echo "== end, $((SECONDS)) s"
exit $status
