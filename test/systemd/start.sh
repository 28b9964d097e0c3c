#!/bin/bash
# Becomes, in new namespaces, the systemd of a Debian: start.sh ROOT DIRECTORY CGROUP (debian-machine.ts). ROOT stays as it is;
# what is written lies in DIRECTORY.
set -euo pipefail
root=$1 directory=$2 cgroup=$3
echo $$ >"$cgroup/cgroup.procs"

exec unshare --mount --pid --uts --ipc --cgroup --fork --kill-child --propagation private bash -euc '
  lower=$0 directory=$1 new=$1/root
  mount -t overlay -o "lowerdir=$lower,upperdir=$directory/upper,workdir=$directory/work" overlay "$new"
  mount --bind "$directory/var" "$new/var"
  mount -t proc proc "$new/proc"
  mount -t sysfs sys "$new/sys"
  mount -t cgroup2 cgroup "$new/sys/fs/cgroup"
  mount -t tmpfs -o mode=755 tmpfs "$new/run"
  mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
  # Under the same path as outside.
  mkdir -p "$new$directory/shared"
  mount --bind "$directory/shared" "$new$directory/shared"
  # Devices: those that daemons and containers want, not the terminals of this machine.
  mount -t tmpfs -o mode=755 tmpfs "$new/dev"
  mkdir "$new/dev/pts" "$new/dev/shm"
  mount -t devpts -o newinstance,ptmxmode=0666 devpts "$new/dev/pts"
  mount -t tmpfs tmpfs "$new/dev/shm"
  ln -s pts/ptmx "$new/dev/ptmx"
  for device in null zero full random urandom tty fuse loop-control nbd{0..31} loop{0..7}; do
    if [ -e "/dev/$device" ]; then cp -a "/dev/$device" "$new/dev/$device"; fi
  done
  for link in fd:/proc/self/fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
    ln -s "${link#*:}" "$new/dev/${link%%:*}"
  done
  hostname systemd
  cd "$new"
  mkdir -p before
  pivot_root . before
  umount -l /before
  exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /usr/lib/systemd/systemd --system --show-status=no' \
  "$root" "$directory"
