#!/usr/bin/env bash
# Builds the kernels for aarch64 and runs the tests of the runtime on them under qemu-user.
#
# Needs an aarch64 compiler (CXX, default aarch64-linux-gnu-g++) and qemu-aarch64. The first run downloads Debian's
# Python for aarch64 with apt-get, which needs root, and its packages with pip, into build/neon; nothing is installed.
# Tests that need torch are skipped. onnxruntime, which the tests compare with, crashes under qemu 7.2 from 1.24 on.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/build/neon root=$PWD/build/neon/root site=$PWD/build/neon/site
CXX=${CXX:-aarch64-linux-gnu-g++} .venv/bin/python hatch_build.py --machine aarch64 --output "$folder"

if [ ! -x "$root/usr/bin/python3.11" ]; then
  dpkg --add-architecture arm64
  apt-get update -qq
  mkdir -p "$folder/packages"
  # Python, and the libraries that it and the tests' imports load.
  (cd "$folder/packages" && apt-get download -qq {python3.11-minimal,libpython3.11-minimal,libpython3.11-stdlib}:arm64 \
    {libc6,libgcc-s1,libstdc++6,zlib1g,libexpat1,libssl3,libffi8,libbz2-1.0,liblzma5,libsqlite3-0,libuuid1}:arm64)
  for package in "$folder"/packages/*.deb; do dpkg-deb -x "$package" "$root"; done
fi
if [ ! -d "$site" ]; then
  platforms=(--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64)
  .venv/bin/python -m pip install --quiet --target "$site" "${platforms[@]}" --only-binary=:all: --python-version 3.11 \
    --implementation cp numpy scipy safetensors pytest hypothesis pillow click onnx 'onnxruntime<1.24'
fi

# test_library.py compiles for this machine; the deselected test starts a Python of its own, which is not emulated.
skipped=(--ignore=tests/runtime/test_library.py --deselect=tests/runtime/test_session.py::test_sessions_import_no_framework)
mapfile -t with_torch < <(grep -lE "^ *(import torch|from (torch|converters|exporters))" tests/runtime/*.py | sed "s/^/--ignore=/")
export PYTHONPATH=$site:$PWD DSR_TOOL_KERNELS=$folder/_kernels_neon.so OPENBLAS_NUM_THREADS=1
qemu-aarch64 -L "$root" "$root/usr/bin/python3.11" -m pytest -q -p no:cacheprovider tests/runtime "${skipped[@]}" "${with_torch[@]}" "$@"
