#!/bin/sh
# Compiles the library and its driver under AddressSanitizer and UndefinedBehaviorSanitizer, and runs them.
# Usage: csrc/sanitize/run.sh [build folder]
set -eu
csrc=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$(mktemp -d)}
checked="-O1 -g -Wall -Wextra -Wno-ignored-attributes -fsanitize=address,undefined -fno-sanitize-recover=all -I$csrc"
compile() {
    object=$1 source=$2
    shift 2
    ${CXX:-g++} $checked $every "$@" -c "$csrc/$source.cpp" -o "$build/$object.o"
}
has=""
while read -r level families flags; do
    case $level in
    "" | "#"*) continue ;;
    every) every=$flags && continue ;;
    portable) ;;
    *)
        case $(uname -m) in x86_64 | amd64) has="$has -DRW_HAS_$level" ;; *) continue ;; esac
        ;;
    esac
    for family in $(echo "$families" | tr , ' '); do
        compile "${family}_$level" "$family/kernels" $flags "-DRW_ISA=$level" &
    done
    wait
done <"$csrc/levels.txt"
for source in common/huge_pages common/level common/parallel \
    attention/attention elementwise/elementwise four_bit/four_bit products/products \
    sanitize/driver sanitize/elementwise sanitize/products; do
    compile "$(echo "$source" | tr / _)" "$source" $has &
done
wait
${CXX:-g++} $checked $every "$build"/*.o -o "$build/driver"
# GCC's fake stack aligns vectors of 64 bytes to less, and a copy of one ends the process.
ASAN_OPTIONS=detect_stack_use_after_return=0 "$build/driver"
