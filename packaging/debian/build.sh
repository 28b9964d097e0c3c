#!/bin/bash
# Makes a Debian package of this checkout: build.sh [DIRECTORY]. Prints the path of the package.
#
# What npm has installed goes in as it is, native parts included, so it is for this machine's architecture and the major version of
# Node.js that it was installed with; the package says so in its dependencies. Needs `npm ci` to have run. Nothing of it depends
# on when or where it is made: the same checkout gives the same package.
set -euo pipefail
cd "$(dirname -- "$(realpath -- "$0")")/../.."
TARGET=$(realpath -m -- "${1:-.}")
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

VERSION=$(node -p 'require("./package.json").version')
ARCHITECTURE=$(dpkg --print-architecture)
NODE_MAJOR=$(node -p 'process.versions.node.split(".")[0]')
# Of the files, and of the archive's entries.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y package.json)}
export SOURCE_DATE_EPOCH

ROOT=$WORK/root
LIBRARY=$ROOT/usr/lib/erofs-nbd
DOCUMENTS=$ROOT/usr/share/doc/erofs-nbd
mkdir -p "$LIBRARY" "$DOCUMENTS" "$ROOT"/{DEBIAN,etc/erofs-nbd,usr/bin,usr/lib/systemd/system} "$TARGET"

# --- what `npm publish` would publish, and what it needs at run time ---------------------------------------------------

npm run -s build
npm pack --ignore-scripts --silent --pack-destination "$WORK" >/dev/null
tar -xzf "$WORK"/*.tgz -C "$LIBRARY" --strip-components=1
npm ls --omit=dev --all --parseable | sed 1d | sort -u >"$WORK/packages"
while read -r package; do
  place=$LIBRARY/${package#"$PWD"/}
  mkdir -p "$(dirname -- "$place")"
  # A package that lies within another came with that one.
  [ -e "$place" ] || cp -a -- "$package" "$place"
done <"$WORK/packages"

(
  cd "$LIBRARY/node_modules"
  # Sources of what is built already, and what only people and compilers read; licences stay.
  find better-sqlite3/build -type f ! -path better-sqlite3/build/Release/better_sqlite3.node -delete
  rm -rf better-sqlite3/{deps,src} koffi/doc
  find . -type f -regextype egrep -iregex '.*(\.(map|[mc]?ts|c|cc|cpp|h|hh|hpp|inc|s|asm|gypi?)|/(readme|changelog)[^/]*)' -delete
  find . -name .bin -prune -exec rm -rf {} +
  find . -type d -empty -delete
)

mv "$LIBRARY"/{README.md,CHANGELOG.md,docs} "$DOCUMENTS/"
cp LICENSE "$DOCUMENTS/copyright"
mv "$LIBRARY/config.toml" "$ROOT/etc/erofs-nbd/config.toml"
cp packaging/systemd/erofs-nbd-snapshotter.service "$ROOT/usr/lib/systemd/system/"
for command in erofs-nbd:cli erofs-nbd-snapshotter:snapshotter; do
  ln -s "../lib/erofs-nbd/dist/${command#*:}/main.js" "$ROOT/usr/bin/${command%:*}"
  chmod +x "$LIBRARY/dist/${command#*:}/main.js"
done
for program in cli/main snapshotter/main blobserve/main; do
  node "$LIBRARY/dist/$program.js" --help >/dev/null || {
    echo "build: $program.js does not start from what is in the package" >&2
    exit 1
  }
done

# For whoever asks `man`, and the shells.
MANUAL=$ROOT/usr/share/man/man1 COMPLETIONS=$ROOT/usr/share/bash-completion/completions
mkdir -p "$MANUAL" "$COMPLETIONS" "$ROOT/usr/share/zsh/vendor-completions"
node "$LIBRARY/dist/cli/main.js" man | gzip -9n >"$MANUAL/erofs-nbd.1.gz"
node "$LIBRARY/dist/cli/main.js" completion bash >"$COMPLETIONS/erofs-nbd"
node "$LIBRARY/dist/cli/main.js" completion zsh >"$ROOT/usr/share/zsh/vendor-completions/_erofs-nbd"

# --- the package -------------------------------------------------------------------------------------------------------

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
Depends: nodejs (>= 20.18), nodejs (>= $NODE_MAJOR), nodejs (<< $((NODE_MAJOR + 1))), libc6 (>= 2.36), init-system-helpers
Recommends: containerd | containerd.io, kmod
Suggests: erofs-utils
Description: containerd snapshotter that starts containers without waiting for their images
 Each layer of an image is an EROFS block device, served over NBD (or FUSE),
 and only the bytes that are read are fetched, by HTTP range requests to the
 registry. Ordinary tar and tar.gz images are used unchanged.
 .
 This is for Node.js $NODE_MAJOR, whose ABI its native parts were built for.
CONTROL
NAME=erofs-nbd_${VERSION}_$ARCHITECTURE.deb
dpkg-deb --root-owner-group -Zxz --build "$ROOT" "$TARGET/$NAME" >/dev/null
echo "$TARGET/$NAME"
