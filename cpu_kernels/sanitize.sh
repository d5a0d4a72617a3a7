#!/usr/bin/env bash
# Runs the tests of the kernels with AddressSanitizer and UndefinedBehaviorSanitizer; needs g++, cmake and the extra `test`.
set -euo pipefail
cd "$(dirname "$0")/.."

build="$(mktemp -d)"
trap 'rm -rf "$build" cpu_kernels/cpu_kernels.so' EXIT
cmake -S cpu_kernels -B "$build" -DCMAKE_CXX_COMPILER=g++ \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
cmake --build "$build" -j
cp "$build/cpu_kernels.so" cpu_kernels/

# Python itself leaks by design, and XLA's own memory is not watched.
LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  python -m pytest -q tests/cpu_kernels -k "not thread_counts" -p no:cacheprovider "$@"
