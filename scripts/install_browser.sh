#!/bin/sh
# A Chromium for the browser tests, from the system's packages (Debian, Ubuntu).
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if ! command -v apt-get >/dev/null 2>&1; then
  echo "WARNING: no Chromium and no apt-get here: BROWSER TESTS WILL BE SKIPPED. Install Chromium by hand to run them." >&2
  exit 0
fi
as_root=""
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo >/dev/null 2>&1; then
    echo "WARNING: not root and no sudo: Chromium is not installed, BROWSER TESTS WILL BE SKIPPED." >&2
    exit 0
  fi
  as_root="sudo -n"
fi
if ! { $as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends chromium; } >/tmp/chromium-install.log 2>&1; then
  tail -3 /tmp/chromium-install.log >&2
  echo "WARNING: installing Chromium failed: BROWSER TESTS WILL BE SKIPPED." >&2
fi
