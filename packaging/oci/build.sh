#!/bin/bash
# Makes an OCI image of this checkout: build.sh [DIRECTORY]. Prints the path of a tar of an OCI layout, which `ctr image import` takes.
#
# Three layers, so that a new version brings only the last one: what of Debian the program uses (C and C++ library, certificates,
# mount(8) and umount(8), busybox for `sh`, `sleep`, `modprobe` and `nsenter`), Node.js, the program. For this machine's architecture. Needs
# `npm ci` to have run, a C++ compiler, and on its first run a Debian mirror. Nothing depends on when or where it is made, but which
# versions of the Debian packages it has: those of the first run, kept in ${EROFS_NBD_CACHE:-~/.cache/erofs-nbd}/oci-base.
set -euo pipefail
CHECKOUT=$(realpath -- "$(dirname -- "$(realpath -- "$0")")/../..")
SUITE=trixie
PACKAGES=(libc6 libgcc-s1 libstdc++6 ca-certificates busybox-static mount libmount1 libblkid1 libselinux1 libpcre2-8-0)
APPLETS='sh cat chmod cp env grep head id ln ls mkdir mknod modprobe mv nsenter ps readlink rm sed sleep sort stat tail test timeout uname wc'

TARGET=$(realpath -m -- "${1:-.}")
CACHE=$(realpath -m -- "${EROFS_NBD_CACHE:-$HOME/.cache/erofs-nbd}")/oci-base
cd "$CHECKOUT"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y package.json)}

# --- the layers' directories -------------------------------------------------------------------------------------------

base() {
  local root=$1 name
  bash test/debian/fetch-packages.sh "$SUITE" "$CACHE" "${PACKAGES[@]}" >&2
  mkdir -p "$root"/{etc/ssl/certs,proc,sys,dev,run,tmp,root,var/lib,usr/bin,usr/sbin,usr/share/doc}
  for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
  # Only what runs: no locales, manuals, scripts of packages.
  (cd "$CACHE" && find . \( -path '*/lib/*-linux-gnu*/*.so*' -o -path '*/lib*/ld-linux*' -o -path '*/share/doc/*/copyright' \) \
    ! -path '*/gconv/*' ! -path '*/audit/*' -print0 | tar -cf - --null -T -) | tar -xf - -C "$root"
  cp "$(find "$CACHE" -name busybox -path '*bin/*' -type f)" "$root/usr/bin/busybox"
  for name in mount umount; do cp "$(find "$CACHE" -name "$name" -path '*bin/*' -type f)" "$root/usr/bin/$name"; done
  for name in $APPLETS; do ln -s busybox "$root/usr/bin/$name"; done
  find "$CACHE/usr/share/ca-certificates" -name '*.crt' -print0 | LC_ALL=C sort -z | xargs -0 cat >"$root/etc/ssl/certs/ca-certificates.crt"
  echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
  echo 'root:x:0:' >"$root/etc/group"
  echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
  cp "$CACHE/.packages" "$root/usr/share/doc/packages"
}

RUNTIME=$(bash packaging/node/runtime.sh)
base "$WORK/base"
bash packaging/library.sh "$WORK/library" "$RUNTIME"
mkdir -p "$WORK"/{node,program}/usr/lib/erofs-nbd "$WORK/program"/{usr/bin,etc/erofs-nbd,var/lib/erofs-nbd,usr/share/doc/erofs-nbd}
mv "$WORK/library/runtime" "$WORK/node/usr/lib/erofs-nbd/"
rm -rf "$WORK/library"/{docs,README.md,CHANGELOG.md}
mv "$WORK/library/LICENSE" "$WORK/program/usr/share/doc/erofs-nbd/copyright"
mv "$WORK/library/config.toml" "$WORK/program/etc/erofs-nbd/"
mv "$WORK"/library/* "$WORK/program/usr/lib/erofs-nbd/"
for command in erofs-nbd:cli erofs-nbd-snapshotter:snapshotter; do
  ln -s "../lib/erofs-nbd/dist/${command#*:}/main.js" "$WORK/program/usr/bin/${command%:*}"
done
chroot_loads() { # A library that is missing shows here, where root may chroot.
  [ "$(id -u)" = 0 ] || return 0
  mkdir "$WORK/all"
  cp -al "$WORK"/{base,node,program}/. "$WORK/all/"
  chroot "$WORK/all" /usr/bin/mount --version >/dev/null
  chroot "$WORK/all" /usr/bin/umount --version >/dev/null
  chroot "$WORK/all" /usr/bin/erofs-nbd --version
}
VERSION=$(chroot_loads)
VERSION=${VERSION:-$(node -p 'require("./package.json").version')}

# --- the image ---------------------------------------------------------------------------------------------------------

LAYOUT=$WORK/layout
mkdir -p "$LAYOUT/blobs/sha256" "$TARGET"
TAR=(tar --sort=name --owner=0 --group=0 --numeric-owner --format=pax '--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime')
for layer in base node program; do
  chmod -R u=rwX,go=rX "$WORK/$layer"
  if [ "$layer" = base ]; then chmod 1777 "$WORK/base/tmp"; fi
  # The layers below the program are the same from version to version, also in their times.
  "${TAR[@]}" --mtime="@$([ "$layer" = program ] && echo "$SOURCE_DATE_EPOCH" || echo 0)" -C "$WORK/$layer" -cf "$WORK/$layer.tar" .
  gzip -9n <"$WORK/$layer.tar" >"$WORK/$layer.tar.gz"
done

SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH VERSION=$VERSION WORK=$WORK node -e '
  const { copyFileSync, readFileSync, statSync, writeFileSync } = require("node:fs");
  const { createHash } = require("node:crypto");
  const { SOURCE_DATE_EPOCH, VERSION, WORK } = process.env;
  const blobs = `${WORK}/layout/blobs/sha256`;
  const sha256 = (file) => createHash("sha256").update(readFileSync(file)).digest("hex");
  const json = (value, mediaType) => {
    const text = JSON.stringify(value);
    const hex = createHash("sha256").update(text).digest("hex");
    writeFileSync(`${blobs}/${hex}`, text);
    return { mediaType, digest: `sha256:${hex}`, size: Buffer.byteLength(text) };
  };
  const created = new Date(Number(SOURCE_DATE_EPOCH) * 1000).toISOString().replace(".000", "");
  const names = ["base", "node", "program"];
  const layers = names.map((name) => {
    const file = `${WORK}/${name}.tar.gz`;
    const hex = sha256(file);
    copyFileSync(file, `${blobs}/${hex}`);
    return { mediaType: "application/vnd.oci.image.layer.v1.tar+gzip", digest: `sha256:${hex}`, size: statSync(file).size };
  });
  const config = json({
    created,
    architecture: { x64: "amd64" }[process.arch] ?? process.arch,
    os: "linux",
    config: {
      Env: ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
      Entrypoint: ["/usr/bin/erofs-nbd-snapshotter"],
      WorkingDir: "/",
      StopSignal: "SIGTERM",
      Labels: { "org.opencontainers.image.title": "erofs-nbd", "org.opencontainers.image.version": VERSION,
        "org.opencontainers.image.licenses": "Apache-2.0" },
    },
    rootfs: { type: "layers", diff_ids: names.map((name) => `sha256:${sha256(`${WORK}/${name}.tar`)}`) },
    history: names.map((name) => ({ created, created_by: `packaging/oci/build.sh: ${name}` })),
  }, "application/vnd.oci.image.config.v1+json");
  const manifest = json({ schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json", config, layers },
    "application/vnd.oci.image.manifest.v1+json");
  // A tag has no "+".
  const tag = VERSION.replace(/\+.*/, "");
  writeFileSync(`${WORK}/layout/index.json`, JSON.stringify({ schemaVersion: 2, mediaType: "application/vnd.oci.image.index.v1+json",
    manifests: [{ ...manifest, annotations: { "io.containerd.image.name": `docker.io/library/erofs-nbd:${tag}`,
      "org.opencontainers.image.ref.name": tag } }] }));
  writeFileSync(`${WORK}/layout/oci-layout`, JSON.stringify({ imageLayoutVersion: "1.0.0" }));
'
NAME=erofs-nbd_${VERSION}_$(dpkg --print-architecture).oci.tar
"${TAR[@]}" --mtime="@$SOURCE_DATE_EPOCH" -C "$LAYOUT" -cf "$TARGET/$NAME" oci-layout index.json blobs
echo "$TARGET/$NAME"
