#!/bin/bash
# Runs a command in a throw-away virtual machine whose / is this machine's / (read-only, with a tmpfs on top), on a
# Debian 6.12 kernel with nbd and erofs. No KVM, no root and no network are needed. Starts in about 6 s.
#
#   run.sh CMD [ARG...]
#
# Working directory and environment are the caller's. Output and exit status are the command's; 124: it took longer than
# VM_TIMEOUT; 125: the machine died (the end of its console is printed). The command is root in there.
#
#   VM_TIMEOUT=600         seconds
#   VM_MEMORY=2G VM_CPUS=2
#   VM_WRITABLE="/a /b"    directories of this machine that the command may write to
#   VM_MODULES="..."       kernel modules to load, beside those the machine needs
#   VM_DISK=/image         a raw image as /dev/vda, which keeps what the machine writes to it
#   VM_PIDFILE=/file       where QEMU writes its process id: a machine whose QEMU is killed ends with 137, and says nothing
#   VM_NBDS=8              how many nbd devices the module makes when it is loaded
#   VM_KERNEL=sid          the kernel of that Debian suite instead of 6.12
#   VM_DEBUG=1             kernel messages and console on stderr
#   VM_KEEP=1              keep the directory of the run
#
# A machine without KVM emulates every instruction: programs run 10 to 20 times slower than outside.
set -euo pipefail

[ $# -ge 1 ] || {
  echo "usage: run.sh CMD [ARG...]" >&2
  exit 2
}
HERE=$(dirname -- "$(realpath -- "$0")")
VM=$(realpath -m -- "${EROFS_NBD_CACHE:-$HOME/.cache/erofs-nbd}")/vm
TOOLS=$VM/tools
KERNEL=$VM/kernel${VM_KERNEL:+-$VM_KERNEL}
CACHE=$VM/cache
MODULES="${VM_MODULES:-overlay erofs nbd loop}${VM_DISK:+ virtio_blk}"
read -ra WRITABLE <<<"${VM_WRITABLE:-}"

"$HERE/setup.sh"
mkdir -p "$CACHE"
RUN=$(mktemp -d "${TMPDIR:-/tmp}/erofs-nbd-vm.XXXXXX")

failed() { # message: the run's directory stays, for its logs
  echo "vm: $1; logs are in $RUN" >&2
  for log in console qemu.log; do
    if [ -s "$RUN/$log" ]; then
      echo "== $log" >&2
      tail -n 40 "$RUN/$log" >&2
    fi
  done
  exit "$2"
}

# --- the unpacked packages ---------------------------------------------------------------------------------------------

LIBRARIES=$TOOLS/usr/lib/x86_64-linux-gnu:$TOOLS/lib/x86_64-linux-gnu
# With and without a merged /usr.
first() { # path... -> the first that exists
  local path
  for path in "$@"; do
    if [ -e "$path" ]; then
      echo "$path"
      return
    fi
  done
  failed "none of these is in the unpacked packages: $*" 125
}
LOADER=$(first "$TOOLS"{,/usr}/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2)
BUSYBOX=$(first "$TOOLS"{,/usr}/bin/busybox)
# With the libraries and the loader it was built for, so that this system's do not matter.
tool() { "$LOADER" --library-path "$LIBRARIES" "$@"; }

MODULE_DIRECTORY=$(first "$KERNEL"{,/usr}/lib/modules/*)
VERSION=${MODULE_DIRECTORY##*/}
KERNEL_IMAGE=$(first "$KERNEL/boot/vmlinuz-$VERSION" "$MODULE_DIRECTORY/vmlinuz")

unpack() { # a compressed file -> stdout
  case $1 in
    *.xz) tool "$TOOLS/usr/bin/xz" -dc "$1" ;;
    *.zst) tool "$TOOLS/usr/bin/zstd" -qdc "$1" ;;
    *.gz) gzip -dc "$1" ;;
    *) cat "$1" ;;
  esac
}

# --- first stage: busybox, the modules in the order they depend on each other, guest/init.sh ---------------------------

add_module() { # name, directory of the initramfs
  local name=${1//-/_} directory=$2 file dependency
  [ ! -e "$RUN/seen.$name" ] || return 0
  : >"$RUN/seen.$name"
  file=$(find "$MODULE_DIRECTORY/kernel" -name "${name//_/[-_]}.ko*" | head -n 1)
  [ -n "$file" ] || return 0 # built into the kernel
  unpack "$file" >"$RUN/module.$name"
  # An unpacked package has no modules.dep; the module itself names what it needs.
  for dependency in $(tr '\0' '\n' <"$RUN/module.$name" | sed -n 's/^depends=//p' | head -n 1 | tr , ' '); do
    add_module "$dependency" "$directory"
  done
  MODULE_COUNT=$((MODULE_COUNT + 1))
  mv "$RUN/module.$name" "$(printf '%s/modules/%02d-%s.ko' "$directory" "$MODULE_COUNT" "$name")"
}

archive() { (cd "$1" && find . | "$BUSYBOX" cpio -o -H newc 2>/dev/null) | gzip -1; } # directory -> gzipped cpio

build_first_stage() {
  local directory=$RUN/first-stage module
  mkdir -p "$directory"/{bin,dev,proc,sys,modules,ro,rw,new}
  cp "$BUSYBOX" "$directory/bin/busybox"
  cp "$HERE/guest/init.sh" "$directory/init"
  chmod +x "$directory/init"
  MODULE_COUNT=0
  # libcrc32c wants crc32c_generic without saying so in `depends`.
  for module in crc32c_generic virtio_pci virtio_console 9pnet_virtio 9p $MODULES; do
    add_module "$module" "$directory"
  done
  archive "$directory" >"$RUN/first-stage.gz"
  mv "$RUN/first-stage.gz" "$1"
}

INPUTS=$({
  echo "$MODULES"
  cat "$HERE/run.sh" "$HERE/guest/init.sh" "$KERNEL/.packages"
} | sha256sum | cut -c 1-16)
FIRST_STAGE=$CACHE/first-stage-$INPUTS
[ -s "$FIRST_STAGE" ] || build_first_stage "$FIRST_STAGE"

# --- second stage: what differs from run to run -----------------------------------------------------------------------

mkdir "$RUN/second-stage"
{
  printf 'NBDS=%q\n' "${VM_NBDS:-8}"
  printf 'WRITABLE="%s"\n' "${WRITABLE[*]:-}"
} >"$RUN/second-stage/settings"
{
  export -p | grep -vE '^declare -x (OLDPWD|PWD|SHLVL|_|VM_[A-Z_]*|BASH[A-Z_]*|SHELLOPTS)='
  echo "cd $(printf %q "$PWD") || exit 126"
  printf '%q ' "$@"
  echo
} >"$RUN/second-stage/command"
# Both parts gzipped: an uncompressed second part would have to be aligned.
{
  cat "$FIRST_STAGE"
  archive "$RUN/second-stage"
} >"$RUN/initrd"

# --- the kernel: the ELF file inside the bzImage, started through its PVH note, need not unpack itself under emulation -

extract_kernel() { # bzImage -> ELF file on stdout
  local sectors offset length payload=$RUN/payload
  sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$1")
  read -r offset length <<<"$(od -An -tu4 -j $((0x248)) -N 8 "$1")"
  # The last four bytes of the payload are its unpacked size, no part of the compressed stream.
  tail -c "+$(((sectors + 1) * 512 + offset + 1))" "$1" | head -c $((length - 4)) >"$payload"
  case $(od -An -tx1 -N 4 "$payload" | tr -d ' ') in
    28b52ffd) tool "$TOOLS/usr/bin/zstd" -qdcf "$payload" ;;
    fd377a58) tool "$TOOLS/usr/bin/xz" -dc --single-stream "$payload" ;;
    1f8b*) gzip -dc "$payload" ;;
  esac
}

VMLINUX=$CACHE/vmlinux-$VERSION
if [ ! -s "$VMLINUX" ]; then
  extract_kernel "$KERNEL_IMAGE" >"$RUN/vmlinux" || true
  if [ "$(head -c 4 "$RUN/vmlinux" | od -An -tx1 | tr -d ' ')" = 7f454c46 ]; then
    mv "$RUN/vmlinux" "$VMLINUX"
  else
    VMLINUX=$KERNEL_IMAGE
  fi
fi

# --- the machine ------------------------------------------------------------------------------------------------------

# Without "fast string" instructions the kernel copies with plain ones, which are emulated 3.5 times faster (2.1 GB/s, not 0.6): a copy then
# costs about as much beside everything else as it does on a real processor.
QEMU=("$LOADER" --library-path "$LIBRARIES" "$TOOLS/usr/bin/qemu-system-x86_64"
  -L "$TOOLS/usr/share/qemu" -L "$TOOLS/usr/share/seabios"
  -M q35,sata=off,smbus=off,vmport=off -accel tcg,thread=multi -cpu max,la57=off,erms=off,fsrm=off
  -smp "${VM_CPUS:-2}" -m "${VM_MEMORY:-2G}" -nodefaults -no-user-config -display none -no-reboot)
LOG_LEVEL=4
[ -z "${VM_DEBUG:-}" ] || LOG_LEVEL=7
QEMU+=(-kernel "$VMLINUX" -initrd "$RUN/initrd" -append "console=ttyS0 quiet loglevel=$LOG_LEVEL \
mitigations=off nokaslr tsc=reliable random.trust_cpu=on panic=-1 reboot=t")

share() { # tag, directory, further options
  QEMU+=(-fsdev "local,id=$1,path=$2,security_model=passthrough,multidevs=remap$3"
    -device "virtio-9p-pci,fsdev=$1,mount_tag=$1")
}
share root / ,readonly=on
for index in "${!WRITABLE[@]}"; do
  share "writable$index" "${WRITABLE[$index]}" ''
done

# The host's page cache holds what QEMU has written, so that a QEMU that is killed loses what its machine had not written
# to the disk yet: the dirty pages of its kernel, which is what a power cut loses.
if [ -n "${VM_DISK:-}" ]; then
  QEMU+=(-drive "file=$VM_DISK,format=raw,if=none,id=disk,cache=writeback" -device virtio-blk-pci,drive=disk)
fi
[ -z "${VM_PIDFILE:-}" ] || QEMU+=(-pidfile "$VM_PIDFILE")

# The command's stdout, stderr and status come out of three ports with names; the console is kept for failures.
QEMU+=(-device virtio-serial-pci)
for port in stdout stderr status; do
  QEMU+=(-chardev "file,id=$port,path=$RUN/$port" -device "virtserialport,chardev=$port,name=$port")
done
if [ -n "${VM_DEBUG:-}" ]; then QEMU+=(-serial file:/dev/stderr); else QEMU+=(-serial "file:$RUN/console"); fi

mkfifo "$RUN/stdout" "$RUN/stderr"
cat "$RUN/stdout" &
STDOUT_CAT=$!
cat "$RUN/stderr" >&2 &
STDERR_CAT=$!
QEMU_MODULE_DIR=$TOOLS/usr/lib/x86_64-linux-gnu/qemu \
  timeout -k 5 "${VM_TIMEOUT:-600}" "${QEMU[@]}" </dev/null 2>"$RUN/qemu.log" && QEMU_STATUS=0 || QEMU_STATUS=$?
# Opened once more, the pipes reach their end even when QEMU never opened them.
exec 3<>"$RUN/stdout" 4<>"$RUN/stderr"
exec 3>&- 4>&-
wait "$STDOUT_CAT" "$STDERR_CAT"

STATUS=$(cat "$RUN/status" 2>/dev/null || true)
if [ -z "$STATUS" ]; then
  if [ "$QEMU_STATUS" = 137 ] && [ -n "${VM_PIDFILE:-}" ]; then
    rm -rf "$RUN"
    exit 137
  fi
  [ "$QEMU_STATUS" != 124 ] || failed "the command took longer than ${VM_TIMEOUT:-600} s" 124
  failed "the machine died without a status (qemu: $QEMU_STATUS)" 125
fi
[ -n "${VM_KEEP:-}" ] || rm -rf "$RUN"
exit "$STATUS"
