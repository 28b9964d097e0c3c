#!/bin/bash
# Installs the Debian package in a clean root of trixie, starts the daemon, upgrades, removes and purges it, and looks at what is left;
# in a clean bookworm, whose Node.js is too old, apt has to say so. Last line: {"passed":N,"failed":N}.
#
#   debian-package.sh       needs root, debootstrap and a Debian mirror; about two minutes
set -uo pipefail
cd "$(dirname -- "$(realpath -- "$0")")/../.."
MIRROR=${EROFS_NBD_DEBIAN_MIRROR:-http://deb.debian.org/debian}
CACHE=$(realpath -m -- "${EROFS_NBD_CACHE:-$HOME/.cache/erofs-nbd}")/roots
unset NODE_EXTRA_CA_CERTS NODE_OPTIONS
passed=0 failed=0
WORK=$(mktemp -d /var/tmp/erofs-nbd-package-XXXXXX)

finish() {
  [ -z "${DAEMON:-}" ] || kill "$DAEMON" 2>/dev/null
  umount -R "$WORK/root" 2>/dev/null
  rm -rf --one-file-system "$WORK"
}
trap finish EXIT

check() { # what, command...
  local what=$1
  shift
  if "$@" >"$WORK/said" 2>&1; then
    echo "ok      $what"
    passed=$((passed + 1))
  else
    echo "FAILED  $what"
    sed 's/^/        /' "$WORK/said" | tail -n 20
    failed=$((failed + 1))
  fi
}

clean_root() { # suite, packages: a fresh root at $WORK/root, from a tar that is made once
  local archive=$CACHE/clean-$1.tar
  if [ ! -s "$archive" ]; then
    mkdir -p "$CACHE"
    debootstrap --variant=minbase ${2:+--include="$2"} "$1" "$WORK/made" "$MIRROR" >"$WORK/debootstrap" 2>&1 || {
      tail -n 5 "$WORK/debootstrap"
      return 1
    }
    tar -C "$WORK/made" -cf "$archive.partial" . && mv "$archive.partial" "$archive"
    rm -rf "$WORK/made"
  fi
  umount -R "$WORK/root" 2>/dev/null
  rm -rf --one-file-system "$WORK/root"
  mkdir "$WORK/root"
  tar -C "$WORK/root" -xf "$archive"
  # Its own mounts, so that nothing of what the daemon mounts is seen outside.
  mount --bind "$WORK/root" "$WORK/root"
  mount --make-private "$WORK/root"
  mount -t proc proc "$WORK/root/proc"
  mount -t sysfs -o ro sys "$WORK/root/sys"
  mount --rbind /dev "$WORK/root/dev"
  mount --make-rslave "$WORK/root/dev"
  cp "$WORK"/*.deb "$WORK/root/root/"
}

# Of the package only; what apt and dpkg write on every run is theirs.
left_over() {
  (cd "$WORK/root" && find . -xdev -path '*erofs-nbd*' ! -path './root/*' ! -path './var/log/*' ! -path './var/cache/*')
  grep -F "$WORK/root/var" /proc/self/mountinfo
}
no_process_left() {
  local process left=0
  for process in /proc/[0-9]*; do
    [ "$(readlink "$process/root" 2>/dev/null)" = "$WORK/root" ] || continue
    tr '\0' ' ' <"$process/cmdline"
    left=1
  done
  return "$left"
}
nothing_left() { [ -z "$(left_over | tee /dev/stderr)" ]; }
inside() { DEBIAN_FRONTEND=noninteractive chroot "$WORK/root" "$@"; }
answers() { # until the daemon's socket does
  timeout 60 bash -c 'until chroot "$0" erofs-nbd status --json 2>/dev/null | grep -q "{"; do sleep 0.2; done' "$WORK/root"
}
refuses() { # text, command...: it fails, and says so
  local text=$1
  shift
  ! "$@" >"$WORK/refusal" 2>&1 && grep -qF -- "$text" "$WORK/refusal" || {
    cat "$WORK/refusal"
    return 1
  }
}

OLD=$(bash packaging/debian/build.sh "$WORK") || exit 1
AGAIN=$(bash packaging/debian/build.sh "$WORK/again") || exit 1
check 'two builds are the same to the byte' cmp "$OLD" "$AGAIN"
# The next version: the same content under a higher number.
dpkg-deb -R "$OLD" "$WORK/next"
sed -i 's/^Version: .*/Version: 99.0.0/' "$WORK/next/DEBIAN/control"
dpkg-deb --root-owner-group -Zxz --build "$WORK/next" "$WORK/next.deb" >/dev/null
OLD=/root/$(basename -- "$OLD")

check 'a clean trixie' clean_root trixie nodejs,init-system-helpers
check 'it is installed' inside apt-get install -y --no-install-recommends "$OLD"
check 'its commands are there' inside sh -c 'erofs-nbd --version && erofs-nbd-snapshotter --version'
check 'the service is enabled' test -L "$WORK/root/etc/systemd/system/multi-user.target.wants/erofs-nbd-snapshotter.service"
chroot "$WORK/root" erofs-nbd-snapshotter >"$WORK/daemon" 2>&1 &
DAEMON=$!
check 'the daemon starts and answers' answers
check 'it is upgraded while the daemon runs' inside dpkg -i /root/next.deb
check 'the daemon still answers' answers
check 'it is not removed while the daemon runs' refuses 'not removed' inside apt-get remove -y erofs-nbd
kill "$DAEMON"
wait "$DAEMON"
DAEMON=
echo '# changed' >>"$WORK/root/etc/erofs-nbd/config.toml"
check 'it is removed' inside apt-get remove -y erofs-nbd
check 'what was changed in the configuration is kept' grep -q '# changed' "$WORK/root/etc/erofs-nbd/config.toml"
check 'no process is left' no_process_left
check 'it is purged' inside apt-get purge -y erofs-nbd
check 'nothing is left' nothing_left

check 'a clean bookworm' clean_root bookworm ''
check 'its apt says that Node.js is too old there' \
  refuses 'Depends: nodejs (>= 20.18)' inside apt-get install -y --no-install-recommends "$OLD"

echo "{\"passed\":$passed,\"failed\":$failed}"
[ "$failed" -eq 0 ]
