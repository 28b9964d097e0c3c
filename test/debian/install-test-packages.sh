#!/bin/bash
# Installs what tests and benchmarks run besides Node, from this system's own suite, where it is missing. For machines
# that are there for tests; the demo needs none of it. Needs root.
set -euo pipefail

# A program, and the package that has it.
WANTED='
runc runc
docker-registry docker-registry
containerd containerd
mkfs.erofs erofs-utils
nbdkit nbdkit
fio fio
busybox busybox-static
jq jq
getfattr attr
curl curl
openssl openssl
xz xz-utils
zstd zstd
git git
python3 python3
'
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin DEBIAN_FRONTEND=noninteractive
missing=()
while read -r program package; do
  [ -z "$program" ] || command -v "$program" >/dev/null || missing+=("$package")
done <<<"$WANTED"
# `busybox` may be the dynamic one, which is of no use in an image.
if ! dpkg-query -W -f '${Status}' busybox-static 2>/dev/null | grep -q ' installed$'; then
  [[ " ${missing[*]:-} " == *" busybox-static "* ]] || missing+=(busybox-static)
fi
[ ${#missing[@]} -gt 0 ] || exit 0

echo "installing ${missing[*]}"
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
if ! { apt-get update -q && apt-get install -q -y --no-install-recommends "${missing[@]}"; } >"$LOG" 2>&1 </dev/null; then
  tail -n 20 "$LOG" >&2
  echo "install-test-packages: apt-get could not install ${missing[*]}" >&2
  exit 1
fi
