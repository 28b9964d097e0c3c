#!/bin/bash
# The end-to-end tests with the nbd backend, on a Debian kernel that has nbd, in one boot of the test machine:
#
#   test-vm.sh [TEST-FILE...]           default: see TESTS below
#   test-vm.sh crash [ARGUMENT...]      daemons are killed under a container (npm run test:crash); default: 8 random moments,
#                                       the fault points of nbd
#   test-vm.sh crash --full [...]       at all fault points and 200 random moments, in several boots (test/vm/crash.ts)
#   test-vm.sh conformance [--whole]    containerd's own snapshotter suite (npm run conformance), and of its overlayfs what ours
#                                       does not pass; --whole: all that the command does
#   test-vm.sh reboot                   the machine is rebooted under containers, and comes up without a registry
#   test-vm.sh power-cut [--cuts N]     its power is cut while the cache and SQLite are written, 20 times
#   test-vm.sh systemd [ARGUMENT...]    the Debian package under a systemd that runs there (npm run test:systemd)
#   test-vm.sh --trees                  all layers of test/system/trees.test.ts, also the large ones: half an hour and 8 GiB;
#                                       TREES=small,many: of those named (test/trees/real-layers.ts)
#
# The last line is one JSON object with the counts, the one before it says them in words; the status is 0 when nothing
# failed. What this host cannot run counts as skipped, with its reason. Needs the checkout built (npm run build).
#
#   VM_KERNEL=sid                    Debian's newest kernel instead of 6.12
#   EROFS_NBD_SLOW=6                 how many times longer than outside tests wait
#   VM_TIMEOUT=1080                  seconds for all of it
#   VM_MEMORY=3G
set -uo pipefail
HERE=$(dirname -- "$(realpath -- "$0")")
cd "$HERE/../.."
TESTS='containers recovery'
export EROFS_NBD_BRIEF=1
memory=3 timeout=1080
if [ "${1:-}" = --trees ]; then
  memory=8 timeout=5400
  export TREES=${TREES:-all} DEVICES=no WORK_SIZE=3800M EROFS_NBD_SLOW=${EROFS_NBD_SLOW:-30} SYSTEM_TIMEOUT=${SYSTEM_TIMEOUT:-5200}
  set -- test/system/trees.test.ts
fi
command=
case ${1:-} in
  crash)
    command=crash
    shift
    export EROFS_NBD_VM_CRASH=yes WORK_SIZE=${WORK_SIZE:-1800M}
    memory=4 timeout=2400
    case " $* " in *' --full '*) command=crash-full ;; esac
    [ $# -gt 0 ] || set -- --kills 8 --files 400 --points nbd-sockets-made,nbd-connected,nbd-settled,nbd-disconnected
    ;;
  conformance)
    command=conformance
    shift
    export EROFS_NBD_VM_CONFORMANCE=yes
    memory=2 timeout=3600
    ;;
  systemd)
    command=systemd
    shift
    export EROFS_NBD_VM_CRASH=yes VM_NBDS=16
    memory=4 timeout=2400
    PREPARED=$(mktemp -d /var/tmp/erofs-nbd-prepared-XXXXXX)
    ;;
  reboot | power-cut)
    command=$1
    shift
    memory=2
    ;;
esac
[ -n "$command" ] || [ $# -gt 0 ] || set -- $(printf 'test/system/%s.test.ts ' $TESTS)

OUTPUT=$(mktemp)
trap 'rm -rf "$OUTPUT" ${PREPARED:+"$PREPARED"}' EXIT

# Counts from the output so far; $1: the guest's status or `skip`, $2: the reason for skipping.
finish() {
  GUEST=$1 REASON=${2:-} node -e '
    const lines = require("node:fs").readFileSync(process.argv[1], "utf8").split("\n");
    const { GUEST, REASON } = process.env;
    const counts = { passed: 0, failed: 0, skipped: 0 };
    const count = (what, prefix) => (counts[what] += lines.filter((line) => line.startsWith(prefix)).length);
    count("passed", "ok - "), count("failed", "not ok - "), count("skipped", "skipped - ");
    let finished = 0;
    for (const line of lines.filter((line) => line.startsWith(`{"passed":`))) {
      finished++;
      for (const [what, number] of Object.entries(JSON.parse(line))) counts[what] += number;
    }
    if (GUEST === "skip") {
      counts.skipped++;
      console.log(`skipped: ${REASON}`);
    } else if (counts.failed === 0 && (GUEST !== "0" || finished !== 1)) {
      counts.failed++;
      console.log(`the tests ended with status ${GUEST} before they had counted everything`);
    }
    const ok = counts.failed === 0;
    const kernel = /^kernel (.+)$/m.exec(lines.join("\n"))?.[1];
    console.log(`${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`);
    console.log(JSON.stringify({ ok, kernel: kernel ?? null, attach: kernel === undefined ? null : "nbd", ...counts }));
    process.exitCode = ok ? 0 : 1;' "$OUTPUT"
  exit
}
skip() { finish skip "$1"; }

[ "$(uname -m)" = x86_64 ] || skip "the test machine is an x86_64 one, this host is $(uname -m)"
[ "$(id -u)" = 0 ] || skip 'not root: images with owners and devices cannot be built'
command -v mkfs.ext4 >/dev/null || skip 'no mkfs.ext4: apt-get install e2fsprogs'
available=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)
# The machine's, of which it fills most, and what QEMU keeps of translated code.
needed=$((memory * 1024 + 500))
[ "$available" -ge "$needed" ] || skip "$available MiB of memory available, $needed are needed"
if ! trouble=$("$HERE/setup.sh" 2>&1); then
  skip "the packages of the test machine cannot be had: $(tail -n 1 <<<"$trouble")"
fi
[ -f dist/test/vm/prefetch.js ] || npm run -s build || finish build
if ! trouble=$(node dist/test/vm/prefetch.js 2>&1); then
  echo "$trouble"
  grep -qE 'cannot (fetch|download|read the package lists)' <<<"$trouble" ||
    finish prefetch
  skip "what the tests need cannot be downloaded: $(tail -n 1 <<<"$trouble")"
fi

case $command in
  crash | conformance) guest=(bash "test/vm/guest/$command.sh" "$@") ;;
  systemd)
    node dist/test/systemd/main.js "$@" --prepare "$PREPARED" || finish prepare
    guest=(bash test/vm/guest/systemd.sh "$PREPARED")
    ;;
  crash-full)
    VM_TIMEOUT=${VM_TIMEOUT:-$timeout} VM_MEMORY=${VM_MEMORY:-${memory}G} \
      exec node --enable-source-maps dist/test/vm/crash.js "$@"
    ;;
  '') guest=(bash test/vm/guest/system-tests.sh "$@") ;;
  *) exec node --enable-source-maps "dist/test/vm/$command.js" "$@" ;;
esac
VM_TIMEOUT=${VM_TIMEOUT:-$timeout} VM_MEMORY=${VM_MEMORY:-${memory}G} VM_MODULES='overlay erofs nbd loop ext4' \
  "$HERE/run.sh" "${guest[@]}" 2>&1 | tee "$OUTPUT"
ended=${PIPESTATUS[0]}
# Its last line has the counts already.
[ -z "$command" ] || exit "$ended"
finish "$ended"
