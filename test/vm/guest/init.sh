#!/bin/busybox sh
# First process of the test VM: mounts the host's / with a tmpfs on top, runs /command in it, reports, ends the machine.
# Written by test/vm/run.sh into an initramfs: /settings, /command, /modules/NN-name.ko.
/bin/busybox --install -s /bin
export PATH=/bin

end() {
  echo "vm: $*"
  reboot -f
}

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
. /settings

for module in /modules/*.ko; do
  parameters=
  case $module in *-nbd.ko) parameters="nbds_max=$NBDS" ;; esac
  insmod "$module" $parameters || end "cannot load $module"
done
for port in /sys/class/virtio-ports/*; do
  case $(cat "$port/name") in
    stdout) STDOUT=/dev/${port##*/} ;;
    stderr) STDERR=/dev/${port##*/} ;;
    status) STATUS=/dev/${port##*/} ;;
  esac
done

# loose: nothing changes below, so the guest may cache everything; without it every start of node takes seconds.
share() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,cache=$3" "$1" "$2" || end "cannot mount $1"; }
share root /ro loose
mount -t tmpfs -o mode=755,size=80% tmpfs /rw
mkdir -p /rw/upper /rw/work
mount -t overlay -o lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work overlay /new || end "cannot mount the root"
index=0
for directory in $WRITABLE; do
  mkdir -p "/new$directory"
  share "writable$index" "/new$directory" none
  index=$((index + 1))
done

mkdir -p /new/proc /new/sys /new/dev /new/run /new/tmp
# Mounted anew, not moved: this script goes on using its own.
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts
mount -t tmpfs tmpfs /new/dev/shm
mount -t tmpfs -o mode=755 tmpfs /new/run
mount -t cgroup2 cgroup /new/sys/fs/cgroup
for link in fd:/proc/self/fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
  [ -e "/new/dev/${link%%:*}" ] || ln -s "${link#*:}" "/new/dev/${link%%:*}"
done
ip link set lo up
hostname vm

# Calibrating the time-stamp counter on a busy host may go wrong by any factor. The kernel measures once more within two
# seconds, and says so when both agree to 1 %.
(
  sleep 3
  dmesg | grep -q 'Refined TSC clocksource calibration' ||
    echo hpet >/sys/devices/system/clocksource/clocksource0/current_clocksource
) &

# Pipes and cats between the command and the ports: a port is no terminal and no file, and programs are surprised by it.
mkfifo /rw/stdout /rw/stderr
cat /rw/stdout >"$STDOUT" &
out=$!
cat /rw/stderr >"$STDERR" &
err=$!
cp /command /new/run/vm-command
# On top of the initramfs as switch_root does it: with a chroot alone, runc's mount namespaces would keep the initramfs as
# their root, and processes that join them later would find themselves there.
cd /new
mount --move . /
chroot . /bin/bash /run/vm-command </dev/null >/rw/stdout 2>/rw/stderr
status=$?

# The last output drains; a process left behind may hold the pipes open, which is no reason to wait longer than 1 s.
left=20
while [ $left -gt 0 ] && { kill -0 $out || kill -0 $err; } 2>/dev/null; do
  usleep 50000
  left=$((left - 1))
done
echo $status >"$STATUS"
reboot -f
