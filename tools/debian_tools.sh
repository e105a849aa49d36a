#!/usr/bin/env bash
# Brings Debian's haproxy, caddy, keepalived, docker-registry into a folder (no root, nothing installed),
# for the tests of deploy/ and of pull and push. Elsewhere than on Debian the folder stays empty and
# those tests are skipped.
#
# Usage: tools/debian_tools.sh FOLDER [PACKAGE...]    (PACKAGE: in place of those)
set -euo pipefail
folder=$1
shift
packages="${*:-docker-registry haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 caddy
  keepalived libnl-3-200 libnl-genl-3-200 libnl-route-3-200 libnftnl11 libsnmp40 libpci3 libwrap0}"

rm -rf "$folder"
mkdir -p "$folder/lists/partial" "$folder/packages"
cd "$folder/packages"
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
  echo "not a Debian: the tests that need haproxy, caddy, keepalived or docker-registry will be skipped" >&2
  exit 0
fi
# shellcheck disable=SC2086  # a list of names
fetch() { apt-get "$@" --quiet=2 download $packages 2>errors; }
if ! fetch -o APT::Sandbox::User=; then
  # No package lists on this machine: read them into our own folder.
  lists=(-o "Dir::State::lists=$folder/lists" -o APT::Sandbox::User=)
  if ! apt-get "${lists[@]}" --quiet=2 update 2>errors || ! fetch "${lists[@]}"; then
    cat errors >&2
    echo "the packages cannot be had: the tests that need them will be skipped" >&2
    exit 0
  fi
fi
for package in *.deb; do dpkg-deb --extract "$package" ..; done
cd ..
rm -rf packages lists
