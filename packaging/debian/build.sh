#!/bin/bash
# Makes a Debian package of this checkout: build.sh [--with-node] [DIRECTORY]. Prints the path of the package.
#
#   (none)        for the Node.js of the system, of the major version that npm has installed with: the package depends on it
#   --with-node   with a Node.js of its own, for systems that have none or an old one
#
# Both are one package in two flavours: the second's version ends in `+node…`, so one takes the other's place as an upgrade does,
# while containers run. Needs `npm ci` to have run, and dpkg-dev; --with-node a C++ compiler too. Nothing of it depends on when or
# where it is made: the same checkout gives the same package. COMPRESSION=gzip is for tests: xz takes a minute for a Node.js.
set -euo pipefail
cd "$(dirname -- "$(realpath -- "$0")")/../.."
WITH_NODE=
if [ "${1:-}" = --with-node ]; then
  WITH_NODE=yes
  shift
fi
TARGET=$(realpath -m -- "${1:-.}")
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

ARCHITECTURE=$(dpkg --print-architecture)
NODE_MAJOR=$(node -p 'process.versions.node.split(".")[0]')
# Of the files, and of the archive's entries.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y package.json)}
export SOURCE_DATE_EPOCH

ROOT=$WORK/root
LIBRARY=$ROOT/usr/lib/erofs-nbd
DOCUMENTS=$ROOT/usr/share/doc/erofs-nbd
mkdir -p "$DOCUMENTS" "$ROOT"/{DEBIAN,etc/erofs-nbd,usr/bin,usr/lib/systemd/system} "$TARGET"

NODE=node RUNTIME=
if [ -n "$WITH_NODE" ]; then
  NODE=$LIBRARY/runtime/node
  RUNTIME=$(bash packaging/node/runtime.sh)
fi
bash packaging/library.sh "$LIBRARY" ${RUNTIME:+"$RUNTIME"}
VERSION=$("$NODE" "$LIBRARY/dist/cli/main.js" --version)

mv "$LIBRARY"/{README.md,CHANGELOG.md,docs} "$DOCUMENTS/"
cp -r packaging/kubernetes "$DOCUMENTS/"
cp LICENSE "$DOCUMENTS/copyright"
if [ -n "$WITH_NODE" ]; then mv "$LIBRARY/runtime/LICENSE" "$DOCUMENTS/copyright.node"; fi
mv "$LIBRARY/config.toml" "$ROOT/etc/erofs-nbd/config.toml"
cp packaging/systemd/erofs-nbd-snapshotter.service "$ROOT/usr/lib/systemd/system/"
for command in erofs-nbd:cli erofs-nbd-snapshotter:snapshotter; do
  ln -s "../lib/erofs-nbd/dist/${command#*:}/main.js" "$ROOT/usr/bin/${command%:*}"
done

# For whoever asks `man`, and the shells.
MANUAL=$ROOT/usr/share/man/man1 COMPLETIONS=$ROOT/usr/share/bash-completion/completions
mkdir -p "$MANUAL" "$COMPLETIONS" "$ROOT/usr/share/zsh/vendor-completions"
"$NODE" "$LIBRARY/dist/cli/main.js" man | gzip -9n >"$MANUAL/erofs-nbd.1.gz"
"$NODE" "$LIBRARY/dist/cli/main.js" completion bash >"$COMPLETIONS/erofs-nbd"
"$NODE" "$LIBRARY/dist/cli/main.js" completion zsh >"$ROOT/usr/share/zsh/vendor-completions/_erofs-nbd"

# --- the package -------------------------------------------------------------------------------------------------------

# Which versions of the C and C++ libraries the compiled parts ask for, as those were compiled here.
libraries() {
  mkdir -p "$WORK/shlibdeps/debian"
  echo 'Source: erofs-nbd' >"$WORK/shlibdeps/debian/control"
  find "$LIBRARY" \( -name better_sqlite3.node -o -path "$LIBRARY/runtime/node" \) -printf '-e%p\n' |
    (cd "$WORK/shlibdeps" && xargs dpkg-shlibdeps -O --warnings=0) | sed -n 's/^shlibs:Depends=//p'
}
if [ -n "$WITH_NODE" ]; then
  DEPENDS=
  ABOUT=" This one brings its own Node.js along, $("$NODE" -p process.versions.node), in /usr/lib/erofs-nbd/runtime."
else
  DEPENDS="nodejs (>= 20.18), nodejs (>= $NODE_MAJOR), nodejs (<< $((NODE_MAJOR + 1))), "
  ABOUT=" This one is for Node.js $NODE_MAJOR, whose ABI its native parts were built for."
fi
DEPENDS="$DEPENDS$(libraries), init-system-helpers, mount"

cp packaging/debian/{postinst,prerm,postrm} "$ROOT/DEBIAN/"
echo /etc/erofs-nbd/config.toml >"$ROOT/DEBIAN/conffiles"
chmod -R u=rwX,go=rX "$ROOT"
chmod 755 "$ROOT"/DEBIAN/{postinst,prerm,postrm}
find "$ROOT" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
cat >"$ROOT/DEBIAN/control" <<CONTROL
Package: erofs-nbd
Version: $VERSION
Architecture: $ARCHITECTURE
Section: admin
Priority: optional
Maintainer: The erofs-nbd developers <erofs-nbd@localhost>
Installed-Size: $(du -sk --exclude DEBIAN "$ROOT" | cut -f 1)
Depends: $DEPENDS
Recommends: containerd | containerd.io, kmod
Suggests: erofs-utils
Description: containerd snapshotter that starts containers without waiting for their images
 Each layer of an image is an EROFS block device, served over NBD (or FUSE),
 and only the bytes that are read are fetched, by HTTP range requests to the
 registry. Ordinary tar and tar.gz images are used unchanged.
 .
$ABOUT
CONTROL
NAME=erofs-nbd_${VERSION}_$ARCHITECTURE.deb
dpkg-deb --root-owner-group "-Z${COMPRESSION:-xz}" --build "$ROOT" "$TARGET/$NAME" >/dev/null
echo "$TARGET/$NAME"
