#!/bin/bash
# What is published, in clean places. Last line: {"passed":N,"failed":N}.
#
# - The Debian package in a clean root of trixie, and the one that brings its Node.js along in clean roots of trixie and bookworm
#   without one: installed, the daemon started, upgraded, removed, purged, and a look at what is left. In bookworm, apt has to say
#   of the other that Node.js is too old.
# - The same packages under a systemd that runs (test/systemd), with a container that reads.
# - The OCI image as a container of a containerd that it serves (test/oci).
# - `npm install --global` of what `npm pack` makes.
#
#   debian-package.sh [roots] [systemd] [oci] [npm]     default: all. Needs root, debootstrap and a Debian mirror
set -uo pipefail
cd "$(dirname -- "$(realpath -- "$0")")/../.."
[ $# -gt 0 ] || set -- roots systemd oci npm
MIRROR=${EROFS_NBD_DEBIAN_MIRROR:-http://deb.debian.org/debian}
CACHE=$(realpath -m -- "${EROFS_NBD_CACHE:-$HOME/.cache/erofs-nbd}")/roots
passed=0 failed=0 DAEMON=
WORK=$(mktemp -d /var/tmp/erofs-nbd-package-XXXXXX)

finish() {
  [ -z "$DAEMON" ] || kill "$DAEMON" 2>/dev/null
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
  local archive=$CACHE/clean-$1${2:+-${2//,/-}}.tar
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
# The certificates of this machine's proxies are of no use in there.
inside() { env -u NODE_EXTRA_CA_CERTS -u NODE_OPTIONS DEBIAN_FRONTEND=noninteractive chroot "$WORK/root" "$@"; }
answers() { # until the daemon's socket does
  timeout 60 bash -c 'until env -u NODE_OPTIONS -u NODE_EXTRA_CA_CERTS chroot "$0" erofs-nbd status --json 2>/dev/null | grep -q "{"; do sleep 0.2; done' "$WORK/root"
}
refuses() { # text, command...: it fails, and says so
  local text=$1
  shift
  ! "$@" >"$WORK/refusal" 2>&1 && grep -qF -- "$text" "$WORK/refusal" || {
    cat "$WORK/refusal"
    return 1
  }
}
install_package() { inside apt-get install -y --no-install-recommends --allow-downgrades "/root/$1.deb"; }
runs_with() { # a program: the daemons do
  local process
  for process in "$DAEMON" $(grep -oE '"pid":[0-9]+' "$WORK/root/var/lib/erofs-nbd/blobserve.json" | cut -d : -f 2); do
    [ "$(readlink "/proc/$process/exe")" = "$WORK/root$1" ] || {
      readlink "/proc/$process/exe"
      return 1
    }
  done
}

build() { # name, arguments of build.sh: NAME.deb, and NAME-next.deb, which is the same under a higher version
  local made
  made=$(COMPRESSION=gzip bash packaging/build.sh "${@:2}" "$WORK/$1") || exit 1
  dpkg-deb -R "$made" "$WORK/next"
  sed -i 's/^Version: .*/Version: 99.0.0/' "$WORK/next/DEBIAN/control"
  dpkg-deb --root-owner-group -Zgzip -z1 --build "$WORK/next" "$WORK/$1-next.deb" >/dev/null
  rm -rf "$WORK/next"
  mv "$made" "$WORK/$1.deb"
}

from_start_to_end() { # name of the package, program of its daemons, another flavour: in the root that there is
  local name=$1 node=$2 other=${3:-}
  check "$name is installed" install_package "$name"
  check 'its commands are there' inside sh -c 'erofs-nbd --version && erofs-nbd-snapshotter --version'
  check 'the service is enabled' test -L "$WORK/root/etc/systemd/system/multi-user.target.wants/erofs-nbd-snapshotter.service"
  env -u NODE_EXTRA_CA_CERTS -u NODE_OPTIONS chroot "$WORK/root" erofs-nbd-snapshotter >"$WORK/daemon" 2>&1 &
  DAEMON=$!
  check 'the daemon starts and answers' answers
  check "the daemons are processes of $node" runs_with "$node"
  if [ -n "$other" ]; then
    check 'the other flavour takes its place while the daemon runs' install_package "$other"
    check 'the daemon still answers' answers
    check 'and this one the place of the other' install_package "$name"
  fi
  check 'it is upgraded while the daemon runs' inside dpkg -i "/root/$name-next.deb"
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
}

roots() {
  build plain
  build with-node --with-node
  local again
  again=$(COMPRESSION=gzip bash packaging/build.sh "$WORK/again") || exit 1
  check 'two builds are the same to the byte' cmp "$WORK/plain.deb" "$again"
  again=$(COMPRESSION=gzip bash packaging/build.sh --with-node "$WORK/again") || exit 1
  check 'with Node.js too' cmp "$WORK/with-node.deb" "$again"

  check 'a clean trixie with Node.js' clean_root trixie nodejs,init-system-helpers
  from_start_to_end plain /usr/bin/node with-node
  for suite in trixie bookworm; do
    check "a clean $suite" clean_root "$suite" ''
    check 'it has no Node.js' refuses node inside node --version
    from_start_to_end with-node /usr/lib/erofs-nbd/runtime/node
  done
  check 'of the other flavour, apt says that Node.js is too old in bookworm' \
    refuses 'Depends: nodejs (>= 20.18)' install_package plain
  umount -R "$WORK/root"
}

counted() { # a program of dist/test, its arguments: what it counts is counted
  local said
  said=$(node --enable-source-maps "dist/test/$1/main.js" "${@:2}" | tee /dev/stderr | tail -n 1)
  local counts
  counts=$(node -p 'const { passed, failed } = JSON.parse(process.argv[1]); `${passed} ${failed}`' "$said") || counts='0 1'
  passed=$((passed + ${counts% *})) failed=$((failed + ${counts#* }))
}

from_npm() {
  npm run -s build && npm pack --ignore-scripts --silent --pack-destination "$WORK" >/dev/null
  # From its source: what is compiled already would come from elsewhere than npm's registry.
  check 'npm install --global installs what npm pack makes' \
    env npm_config_build_from_source=true npm install --global --prefix "$WORK/prefix" --no-audit --no-fund "$(echo "$WORK"/erofs-nbd-*.tgz)"
  check 'its commands are there' sh -c "$WORK/prefix/bin/erofs-nbd --version && $WORK/prefix/bin/erofs-nbd-snapshotter --help"
  check 'and are those of this checkout' test "$("$WORK/prefix/bin/erofs-nbd" --version)" = "$(node dist/cli/main.js --version)"
  "$WORK/prefix/bin/erofs-nbd-snapshotter" --root "$WORK/npm" --address "$WORK/npm.sock" >"$WORK/daemon" 2>&1 &
  DAEMON=$!
  echo "root = \"$WORK/npm\"" >"$WORK/npm.toml"
  check 'the daemon starts and answers' timeout 60 bash -c \
    'until "$0/prefix/bin/erofs-nbd" status --json --config "$0/npm.toml" 2>/dev/null | grep -q "{"; do sleep 0.2; done' "$WORK"
  kill "$DAEMON"
  wait "$DAEMON"
  DAEMON=
  check 'npm removes it' npm uninstall --global --prefix "$WORK/prefix" erofs-nbd
  check 'nothing is left' test -z "$(cd "$WORK/prefix" && find . -path '*erofs-nbd*')"
}

for part; do
  case $part in
    roots) roots ;;
    systemd)
      counted systemd --suite bookworm --with-node
      counted systemd --suite trixie --with-node
      ;;
    oci) counted oci ;;
    npm) from_npm ;;
    *)
      echo "debian-package.sh: $part: expected roots, systemd, oci or npm" >&2
      exit 2
      ;;
  esac
done
echo "{\"passed\":$passed,\"failed\":$failed}"
[ "$failed" -eq 0 ]
