#!/usr/bin/env bash
# Brings Debian's haproxy, caddy, nginx, keepalived, docker-registry and, where the system has none, Chromium
# into a folder (no root, nothing installed), for the tests of deploy/, of pull and push, and of the pages, and
# for `make bench-gateway`. Elsewhere than on Debian the folder stays empty and those tests are skipped.
#
# Usage: tools/debian_tools.sh FOLDER
set -euo pipefail
folder=$1
packages="docker-registry haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 caddy nginx
  keepalived libnl-3-200 libnl-genl-3-200 libnl-route-3-200 libnftnl11 libsnmp40 libpci3 libwrap0"

rm -rf "$folder"
mkdir -p "$folder/lists/partial" "$folder/packages"
cd "$folder/packages"
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
  echo "not a Debian: the tests that need haproxy, caddy, nginx, keepalived or docker-registry will be skipped" >&2
  exit 0
fi
apt=(-o APT::Sandbox::User=)
with_own_lists() { # this machine has none, or old ones: read them into our own folder
  apt+=(-o "Dir::State::lists=$folder/lists")
  apt-get "${apt[@]}" --quiet=2 update 2>errors
}
fetch() { apt-get "${apt[@]}" --quiet=2 download "$@" 2>errors; }
fetch_browser() { # with all that it needs and this machine lacks
  local names
  names=$(apt-get "${apt[@]}" install --print-uris --no-install-recommends --quiet=2 --yes \
    chromium-headless-shell 2>errors | awk '{print $2}' | cut -d_ -f1) || return
  # shellcheck disable=SC2086  # a list of names
  (mkdir -p browser && cd browser && fetch $names && mv ./*.deb ..)
}
# shellcheck disable=SC2086  # a list of names
if ! fetch $packages && ! { with_own_lists && fetch $packages; }; then
  cat errors >&2
  echo "the packages cannot be had: the tests that need them will be skipped" >&2
  exit 0
fi
if ! command -v chromium >/dev/null && ! fetch_browser && ! { with_own_lists && fetch_browser; }; then
  cat errors browser/errors >&2 || true
  echo "chromium cannot be had: the tests of the pages will be skipped" >&2
fi
for package in *.deb; do dpkg-deb --extract "$package" ..; done
cd ..
rm -rf packages lists
