#!/usr/bin/env bash
# Makes sure that `chromium` is on the path, for the tests that open a page: on Debian, as root, through apt-get.
# Says nothing where it is there already or was installed; otherwise ends with one line that says what to install.
set -euo pipefail

fail() {
  echo "chromium.sh: $1; install a chromium and a font, on Debian: apt-get install chromium fonts-dejavu-core" >&2
  exit 1
}

# The log of apt-get stays unread unless it fails; its last line then is the reason.
apt() {
  local log
  log=$(DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 "$@" 2>&1) ||
    fail "apt-get $1 failed (${log##*$'\n'})"
}

if command -v chromium >/dev/null; then exit 0; fi
if ! command -v apt-get >/dev/null; then fail "no chromium on the path, and no apt-get"; fi
if [ "$(id -u)" != 0 ]; then fail "no chromium on the path, and only root may install it"; fi
apt update
# Chromium draws no letter without a font, and depends on none.
apt install -y --no-install-recommends chromium fonts-dejavu-core
if ! command -v chromium >/dev/null; then fail "the package chromium put none on the path"; fi
