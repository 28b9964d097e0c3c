#!/bin/bash
# Makes packages of this checkout, after `npm ci`, and prints where they are: npm run package -- [WHAT] [DIRECTORY]
#
#   (none)        the Debian package, for the Node.js of the system
#   --with-node   the Debian package with a Node.js of its own
#   --oci         the OCI image, a tar of an OCI layout
set -euo pipefail
HERE=$(dirname -- "$(realpath -- "$0")")
case ${1:-} in
  --oci)
    shift
    exec bash "$HERE/oci/build.sh" "$@"
    ;;
  --with-node) exec bash "$HERE/debian/build.sh" "$@" ;;
  -*)
    sed -n '/^#   /s/^# *//p' "$0" >&2
    exit 2
    ;;
  *) exec bash "$HERE/debian/build.sh" "$@" ;;
esac
