#!/bin/bash
# Puts the program as it runs into a new or empty DIRECTORY: what `npm publish` would publish, and the packages that needs at run time,
# native parts included: library.sh DIRECTORY [RUNTIME]
#
#   RUNTIME   directory of a Node.js, as node/runtime.sh prints it: it is put there too, the commands use it, and what depends on a
#             version of Node.js is the one made for it. Without it the program is for the Node.js that npm has installed with.
#
# Needs `npm ci` to have run. Nothing of it depends on when or where it is made.
set -euo pipefail
cd "$(dirname -- "$(realpath -- "$0")")/.."
LIBRARY=$(realpath -m -- "$1")
RUNTIME=${2:+$(realpath -- "$2")}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$LIBRARY"

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

NODE=node
if [ -n "$RUNTIME" ]; then
  NODE=$LIBRARY/runtime/node
  mkdir "$LIBRARY/runtime"
  cp "$RUNTIME"/{node,LICENSE} "$LIBRARY/runtime/"
  cp "$RUNTIME/better_sqlite3.node" "$LIBRARY/node_modules/better-sqlite3/build/Release/"
  # A daemon hands its devices to one of another version: a newer runtime is one, also where nothing else has changed.
  VERSION=$("$NODE" -p process.versions.node) "$NODE" -e '
    const { readFileSync, writeFileSync } = require("node:fs");
    const file = process.argv[1];
    const said = JSON.parse(readFileSync(file, "utf8"));
    writeFileSync(file, JSON.stringify({ ...said, version: `${said.version}+node${process.env.VERSION}` }, null, 2) + "\n");
  ' "$LIBRARY/package.json"
  sed -i '1s|^#!/usr/bin/env node$|#!/usr/lib/erofs-nbd/runtime/node|' "$LIBRARY"/dist/{cli,snapshotter,blobserve}/main.js
fi
chmod +x "$LIBRARY"/dist/{cli,snapshotter}/main.js
for program in cli/main.js snapshotter/main.js blobserve/main.js programs/blobserve.cjs; do
  "$NODE" "$LIBRARY/dist/$program" --help >/dev/null || {
    echo "library: dist/$program does not start from what was put together" >&2
    exit 1
  }
done
# With a Node.js of its own it is known which one will run it; otherwise whoever installs it compiles it.
[ -z "$RUNTIME" ] || "$NODE" "$LIBRARY/dist/daemon/write-code-cache.js"
chmod -R u=rwX,go=rX "$LIBRARY"

# Their --help needs neither.
(cd "$LIBRARY" && "$NODE" --input-type=module -e '
  const { default: Database } = await import("better-sqlite3");
  new Database(":memory:").close();
  await import("koffi");') || {
  echo "library: native parts cannot be loaded" >&2
  exit 1
}
