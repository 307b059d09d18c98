#!/bin/sh
# What exported models are tried in, for the tests (the extra `peers`). Arguments: python, then options for pip.
python=$1
shift
# Only llama.cpp's library is wanted, not its programs for pictures and sound; little optimisation halves the compiler's time. Such a
# build is for nobody else: pip must not keep it for whoever installs the package next (--no-cache-dir).
if [ -z "${CMAKE_ARGS:-}" ]; then
  CMAKE_ARGS='-DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG"'
  export CMAKE_ARGS
fi
log=$(mktemp)
echo "Installing llama.cpp for the tests: it is compiled, which takes several minutes once." >&2
if ! "$python" -m pip install -q --no-cache-dir "$@" -e ".[peers]" >"$log" 2>&1; then
  tail -5 "$log" >&2
  echo "********************************************************************************************************" >&2
  echo "WARNING: llama-cpp-python could not be installed: WHAT LLAMA.CPP MAKES OF OUR FILES WILL NOT BE TESTED." >&2
  echo "It wants a C and C++ compiler. The whole output of pip is in $log" >&2
  echo "********************************************************************************************************" >&2
  exit 1
fi
rm -f "$log"
