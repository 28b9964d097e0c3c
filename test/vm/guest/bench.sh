#!/bin/bash
# Runs one of the benchmarks (npm run bench) in the test machine: bench.sh NAME [ARGUMENT...]
set -euo pipefail
cd "$(dirname -- "$(realpath -- "$0")")/../../.."

# A file system such as users have: tmpfs knows no reads that do not wait.
mkdir -p /run/w
truncate -s 2G /dev/shm/work.img
mkfs.ext4 -q -F -O ^has_journal /dev/shm/work.img
mount -o loop /dev/shm/work.img /run/w

echo "kernel $(uname -r), $(nproc) CPUs, emulated"
TMPDIR=/run/w exec node "${DIST:-dist}/test/bench/main.js" "$@"
