#!/usr/bin/env bash
# Makes a base for the image without any registry, from Debian's packages alone, and prints its name:
# BASE=$(scripts/image/base.sh) scripts/build_image.sh
#
# Needs debootstrap, the rights of root, and podman or docker. What is there is not made again: the name has a hash of
# how it is made, and its tar file stays in the cache. MIRROR is Debian's (default http://deb.debian.org/debian).
set -euo pipefail

packages=ca-certificates,libgomp1,python3,python3-venv
cache=${XDG_CACHE_HOME:-$HOME/.cache}/quotesmith/base
engine=$(command -v podman || command -v docker) || { echo "base: neither podman nor docker was found" >&2; exit 1; }

make_archive() {
  debootstrap --variant=minbase --include="$packages" bookworm "$1/root" "${MIRROR:-http://deb.debian.org/debian}" >&2
  rm -rf "$1"/root/var/{cache/apt,lib/apt/lists,log}/* "$1"/root/usr/share/{doc,man,locale,info}/*
  tar --create --file "$1/base.tar" --numeric-owner --sort=name --mtime=@0 --exclude='./dev/*' -C "$1/root" .
}

key=$( (uname -m; echo "$packages"; declare -f make_archive) | sha256sum | cut -c1-16)
name=localhost/quotesmith-base:bookworm-$key
archive=$cache/bookworm-$key.tar
if [ ! -e "$archive" ]; then
  command -v debootstrap >/dev/null || { echo "base: no debootstrap; install it (apt-get install debootstrap)" >&2; exit 1; }
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/making.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  make_archive "$work"
  rm -f "$cache"/bookworm-*.tar   # made otherwise, or of other packages
  mv "$work/base.tar" "$archive"
fi
if ! "$engine" image inspect "$name" >/dev/null 2>&1; then
  "$engine" import --change "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "$archive" "$name" >&2
fi
echo "$name"
