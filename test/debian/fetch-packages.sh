#!/bin/bash
# Downloads packages of a Debian suite and unpacks them into a directory of their own. Nothing is installed, and apt's
# sources, lists, caches and package state of this system are neither changed nor used: everything is below
# ${EROFS_NBD_CACHE:-~/.cache/erofs-nbd}/apt/SUITE. What apt downloads is verified against Debian's archive keys.
#
#   fetch-packages.sh [--with-dependencies] SUITE DIRECTORY PACKAGE[=VERSION]...
#   fetch-packages.sh --source SUITE DIRECTORY PACKAGE
#   fetch-packages.sh --list SUITE PACKAGE...
#
#   --source             the upstream source that the package is built from, without Debian's own files
#   --list               only prints name=version of the packages and all their dependencies, a line each
#   --with-dependencies  also everything the packages depend on, as on a system with nothing installed (no recommends)
#   SUITE                bookworm, bookworm-backports, trixie, sid, ...; or `system`, the suite this system runs
#   DIRECTORY            where the packages are unpacked; replaced as a whole. DIRECTORY/.packages lists what is in it
#
# A DIRECTORY that already holds what is asked for is left as it is, without a look at the network: remove it to take
# newer versions. Two at once may ask for the same directory. Needs apt, dpkg, flock and tar; root is not needed.
# The mirror is the one in this system's sources; EROFS_NBD_DEBIAN_MIRROR overrules it.
set -euo pipefail

die() {
  echo "fetch-packages: $*" >&2
  exit 1
}

CLOSURE=no LIST=no SOURCE=no
case ${1:-} in
  --with-dependencies) CLOSURE=yes; shift ;;
  --source) SOURCE=yes; shift ;;
  --list) CLOSURE=yes; LIST=yes; shift; set -- "${1:-}" /nonexistent "${@:2}" ;;
esac
[ $# -ge 3 ] || die "usage: fetch-packages.sh [--with-dependencies] SUITE DIRECTORY PACKAGE[=VERSION]..."
SUITE=$1
TARGET=$2
shift 2

for tool in apt-get apt-config dpkg dpkg-deb flock tar; do
  command -v "$tool" >/dev/null || die "$tool is missing: this script needs a Debian system (or one with apt and dpkg)"
done
CODENAME=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ "$SUITE" != system ] || SUITE=${CODENAME:-sid}
case $SUITE in *[!a-z0-9-]* | '') die "not the name of a suite: '$SUITE'" ;; esac

# `realpath -m` also for a directory that is not there yet, without a slash at its end.
TARGET=$(realpath -m -- "$TARGET")
REQUEST="suite=$SUITE dependencies=$([ $SOURCE = no ] && echo $CLOSURE || echo source) packages=$(printf '%s\n' "$@" | LC_ALL=C sort -u | tr '\n' ' ')"
STAMP=$TARGET/.packages

complete() { [ -f "$STAMP" ] && [ "$(head -n 1 "$STAMP")" = "# $REQUEST" ]; }
if complete; then exit 0; fi
if [ -e "$TARGET" ] && [ ! -f "$STAMP" ] && [ -n "$(ls -A -- "$TARGET")" ]; then
  die "$TARGET holds files that this script has not put there; name an empty or a new directory"
fi

CACHE=$(realpath -m -- "${EROFS_NBD_CACHE:-$HOME/.cache/erofs-nbd}")/apt
STATE=$CACHE/$SUITE TYPE=deb
# Lists of sources are long, and few want them: they are kept apart.
if [ "$SOURCE" = yes ]; then STATE=$STATE-source TYPE=deb-src; fi
if [ "$LIST" = no ]; then
  mkdir -p "$CACHE/locks" "$(dirname -- "$TARGET")"
  exec {TARGET_LOCK}>"$CACHE/locks/$(echo "$TARGET" | sha256sum | cut -c 1-32)"
  flock "$TARGET_LOCK"
  # Another run may have finished it while this one waited.
  if complete; then exit 0; fi
fi

mkdir -p "$STATE"/{etc/apt.conf.d,etc/preferences.d,lists/partial,archives/partial,state,log}
exec {SUITE_LOCK}>"$STATE/lock"
flock "$SUITE_LOCK"

WORK=$(mktemp -d "$STATE/work.XXXXXX")
if [ "$LIST" = yes ]; then UNPACKED=$WORK/unpacked; else UNPACKED=$(mktemp -d "$TARGET.XXXXXX"); fi
mkdir -p -m 755 "$UNPACKED"
chmod 755 "$UNPACKED"
trap 'rm -rf -- "$WORK" "$UNPACKED" "$UNPACKED.replaced"' EXIT

# --- apt's own little world -----------------------------------------------------------------------------------------

# apt itself reads this system's sources, whatever their format, and says where they point.
system_mirror() {
  apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE)' 'Identifier: Packages' 2>/dev/null |
    awk -v suite="$CODENAME" '
      $1 ~ /security/ { next }
      $2 == suite && !exact { exact = $1 }
      $1 ~ /\/debian\/?$/ && !likely { likely = $1 }
      END { print exact ? exact : likely }'
}
MIRROR=${EROFS_NBD_DEBIAN_MIRROR:-}
if [ -z "$MIRROR" ] && [ "$(. /etc/os-release && echo "${ID:-}")" = debian ]; then MIRROR=$(system_mirror); fi
MIRROR=${MIRROR:-http://deb.debian.org/debian}

# A suite such as bookworm-backports is complete only together with the one it is built upon.
case $SUITE in
  *-backports | *-updates | *-proposed-updates) SUITES="${SUITE%%-*} $SUITE" ;;
  *) SUITES=$SUITE ;;
esac

find_keyring() { # directory -> the keyring of Debian's archive in it, if any
  local file
  for file in "$1"/debian-archive-keyring.{pgp,gpg}; do
    if [ -s "$file" ]; then
      realpath -- "$file"
      return
    fi
  done
}

# The newer keyring that an earlier run fetched, when this system's own is too old for the suite.
FETCHED_KEYRING=$CACHE/keyring
write_configuration() {
  local keyrings
  keyrings="${EROFS_NBD_DEBIAN_KEYRING:-$(find_keyring /usr/share/keyrings)} \
$(find_keyring "$FETCHED_KEYRING/usr/share/keyrings")"
  [ -n "${keyrings// /}" ] ||
    die "no /usr/share/keyrings/debian-archive-keyring.gpg: install debian-archive-keyring so that downloads can be verified"
  printf 'Types: %s\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' \
    "$TYPE" "$MIRROR" "$SUITES" "$(echo $keyrings)" >"$STATE/etc/private.sources"
  {
    # How this system reaches mirrors (proxies, time-outs) holds here too; its hooks do not.
    env -u APT_CONFIG apt-config dump | grep -E '^Acquire::(http|https|Retries|ForceIP|Check-Valid|Check-Date|Max-)' || true
    cat <<CONFIGURATION
Dir "$STATE";
Dir::Etc "$STATE/etc";
Dir::Etc::main "apt.conf";
Dir::Etc::parts "apt.conf.d";
Dir::Etc::preferences "preferences";
Dir::Etc::preferencesparts "preferences.d";
Dir::Etc::sourcelist "$STATE/etc/private.sources";
Dir::Etc::sourceparts "-";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "/dev/null";
Dir::Etc::netrc "/etc/apt/auth.conf";
Dir::Etc::netrcparts "/etc/apt/auth.conf.d";
Dir::State "$STATE/state";
Dir::State::lists "$STATE/lists";
Dir::State::status "$STATE/status";
Dir::Cache "$STATE";
Dir::Cache::archives "$STATE/archives";
Dir::Log "$STATE/log";
APT::Architecture "$(dpkg --print-architecture)";
APT::Architectures { "$(dpkg --print-architecture)"; };
APT::Default-Release "$SUITE";
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "3";
CONFIGURATION
  } >"$STATE/apt.conf"
}
: >"$STATE/status"
export APT_CONFIG=$STATE/apt.conf DEBIAN_FRONTEND=noninteractive LC_ALL=C

explain() { # what failed
  sed 's/^/  /' "$WORK/log" >&2
  die "$1 (mirror $MIRROR, suite $SUITE; EROFS_NBD_DEBIAN_MIRROR names another mirror)"
}

update() {
  # Without error-mode=any a mirror that cannot be reached is only a warning, and old lists would be used.
  apt-get update -q -o APT::Update::Error-Mode=any >"$WORK/log" 2>&1
}

# Suites newer than this system are signed with keys that its keyring may not hold yet. They are in the
# debian-archive-keyring of releases whose own signatures the keyring does verify.
fetch_keyring() {
  local from
  [ -z "${EROFS_NBD_FETCHING_KEYRING:-}" ] || return 1
  for from in "$CODENAME-updates" "$CODENAME" bookworm trixie; do
    case $from in -* | '' | "$SUITE") continue ;; esac
    rm -rf -- "$FETCHED_KEYRING"
    if env -u APT_CONFIG EROFS_NBD_FETCHING_KEYRING=1 "$0" "$from" "$FETCHED_KEYRING" debian-archive-keyring 2>/dev/null; then
      write_configuration
      if update; then return 0; fi
    fi
  done
  return 1
}

LISTS=$STATE/lists/.updated
refresh_lists() {
  rm -f "$LISTS"
  if ! update; then
    grep -qE 'NO_PUBKEY|Missing key|not signed' "$WORK/log" || explain "cannot read the package lists"
    cp "$WORK/log" "$WORK/first"
    if ! fetch_keyring; then
      cp "$WORK/first" "$WORK/log"
      explain "the suite is signed with keys this system does not know, and no newer debian-archive-keyring was found"
    fi
  fi
  echo "$MIRROR" >"$LISTS"
}

# --- what to fetch, and fetching it -----------------------------------------------------------------------------------

select_packages() { # -> $WORK/selection: one `name=version` a line
  if [ "$CLOSURE" = yes ]; then
    apt-get install -s -q -- "$@" >"$WORK/plan" 2>"$WORK/log" || return 1
    # Inst libc6 (2.36-9 Debian:12.1/stable [amd64])
    sed -nE 's/^Inst ([^ ]+) \(([^ ]+) .*/\1=\2/p' "$WORK/plan" >"$WORK/selection"
  elif [ "$SOURCE" = yes ]; then
    apt-get source -q --download-only --print-uris -- "$@" >"$WORK/plan" 2>"$WORK/log" || return 1
    # 'http://…/erofs-utils_1.9.4-1.dsc' erofs-utils_1.9.4-1.dsc 2218 SHA256:…
    sed -nE 's/.* ([^ _]+)_([^ ]+)\.dsc .*/\1=\2/p' "$WORK/plan" >"$WORK/selection"
  else
    apt-get download -q --print-uris -- "$@" >"$WORK/plan" 2>"$WORK/log" || return 1
    # 'http://…/runc_1.1.5-1_amd64.deb' runc_1.1.5-1_amd64.deb 123 SHA256:…
    awk '{ split($2, part, "_"); version = part[2]; gsub(/%3a/, ":", version); print part[1] "=" version }' \
      "$WORK/plan" >"$WORK/selection"
  fi
  [ -s "$WORK/selection" ] || return 1
}

download() { # every selected package into archives/; what an earlier run left there is verified again by apt
  local how=download
  [ "$SOURCE" = no ] || how='source --download-only'
  (cd "$STATE/archives" && xargs -r apt-get $how -q -- <"$WORK/selection") >"$WORK/log" 2>&1
}

write_configuration
if [ -z "$(find "$LISTS" -mmin -720 2>/dev/null)" ] || [ "$(cat "$LISTS" 2>/dev/null)" != "$MIRROR" ]; then
  refresh_lists
fi
fetch() { select_packages "$@" && { [ "$LIST" = yes ] || download; }; }
if ! fetch "$@"; then
  # Lists of some hours ago may name versions that the mirror has replaced since.
  refresh_lists
  select_packages "$@" || explain "no such package, or its dependencies cannot be met: $*"
  [ "$LIST" = yes ] || download || explain "cannot download"
fi
if [ "$LIST" = yes ]; then
  LC_ALL=C sort "$WORK/selection"
  exit 0
fi

sort -o "$WORK/selection" "$WORK/selection"
while IFS='=' read -r name version; do
  if [ "$SOURCE" = yes ]; then
    tar -C "$UNPACKED" --strip-components=1 --no-same-owner -xf "$STATE/archives/${name}_${version%-*}".orig.tar.* ||
      die "cannot unpack the source of $name $version"
    continue
  fi
  file=$(find "$STATE/archives" -maxdepth 1 -name "${name}_${version//:/%3a}_*.deb" | head -n 1)
  [ -n "$file" ] || die "$name $version was downloaded but is not in $STATE/archives"
  dpkg-deb -x "$file" "$UNPACKED" || die "cannot unpack $file"
done <"$WORK/selection"
{
  echo "# $REQUEST"
  cat "$WORK/selection"
} >"$UNPACKED/.packages"

# Archives are kept for other directories that ask for the same packages, those of old versions are not.
find "$STATE/archives" -maxdepth 1 -type f -mtime +30 -delete

if [ -e "$TARGET" ]; then mv -T -- "$TARGET" "$UNPACKED.replaced"; fi
mv -T -- "$UNPACKED" "$TARGET"
