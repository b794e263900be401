#!/bin/sh
# Compiles the library and its driver under AddressSanitizer and UndefinedBehaviorSanitizer, and runs them.
# Usage: csrc/sanitize.sh [build folder]
set -eu
source_folder=$(cd "$(dirname "$0")" && pwd)
build=${1:-$(mktemp -d)}
flags="-std=c++17 -O1 -g -ffp-contract=off -pthread -Wall -Wextra -Wno-ignored-attributes"
flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all"
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl"
compile() {
    name=$1
    shift
    ${CXX:-g++} $flags "$@" -c "$source_folder/$name.cpp" -o "$build/$name.o"
}
case $(uname -m) in
x86_64 | amd64) ;;
*) avx2="" avx512="" ;;
esac
for name in native attention products training parallel level_portable sanitize_driver; do compile $name & done
wait
for family in level training; do
    compile ${family}_avx2 $avx2 &
    compile ${family}_avx512 $avx512 &
    compile ${family}_avx512_bf16 $avx512 ${avx512:+-mavx512bf16} &
done
for name in training_portable sanitize_training sanitize_products; do compile $name & done
for name in attention_avx2 products_avx2; do compile $name $avx2 & done
for name in attention_avx512_bf16 products_avx512_bf16; do compile $name $avx512 ${avx512:+-mavx512bf16} & done
for name in attention_amx products_amx; do compile $name $avx512 ${avx512:+-mavx512bf16 -mamx-tile -mamx-bf16} & done
wait
${CXX:-g++} $flags "$build"/*.o -o "$build/driver"
"$build/driver"
