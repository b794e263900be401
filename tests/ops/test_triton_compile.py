"""The kernels compile for cards that need not be here, spill no registers, and round as the reference does."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton.backends.nvidia")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_kernels  # noqa: E402

# The cards that most users have.
OFTEN = (86, 89, 90)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def on_cards() -> Iterator[Any]:
    """Each third case, on 8.6 or 9.0 in turn; 8.9 has the registers of 8.6."""
    for index, name in enumerate(gpu_kernels.cases()):
        for architecture in OFTEN:
            marks = [] if (index % 3, architecture) == (0, (86, 90)[index % 2]) else [pytest.mark.long]
            yield pytest.param(name, architecture, marks=marks, id=f"{name}-{architecture}")


def compiled(name: str, architecture: int, *, aligned: bool = True) -> list[Any]:
    launches = gpu_kernels.launches(name, architecture)
    return [gpu_kernels.compiled(launch, architecture, aligned=aligned) for launch in launches]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), on_cards())
def test_every_kernel_compiles_without_spilling(name: str, architecture: int) -> None:
    for kernel in compiled(name, architecture):
        found = gpu_kernels.usage(kernel)
        assert found.spilled == 0, found
        assert found.shared <= gpu_kernels.SHARED[architecture], found


@pytest.mark.long
@pytest.mark.parametrize("architecture", gpu_kernels.CARDS)
@pytest.mark.parametrize("name", gpu_kernels.cases())
def test_every_kernel_compiles_as_the_page_says_and_for_odd_sizes(name: str, architecture: int) -> None:
    assert compiled(name, architecture)
    assert compiled(name, architecture, aligned=False)


def test_every_kernel_has_a_case() -> None:
    launched = {(name, launch.name) for name in gpu_kernels.cases() for launch in gpu_kernels.launches(name)}
    kernels = {name for module in gpu_kernels.MODULES for name in vars(module) if name.endswith("_kernel")}
    assert {f"{kernel}_kernel" for _, kernel in launched} == kernels
    folder = Path(gpu_kernels.adapter.__file__).parent
    in_files = {name for path in folder.glob("*.py") for name in re.findall(r"def (\w+_kernel)\(", path.read_text())}
    assert in_files == kernels


@pytest.mark.parametrize("name", ["dequantize", "dequantize double"])
def test_weights_are_multiplied_and_added_in_two_roundings_and_keep_subnormals(name: str) -> None:
    (kernel,) = compiled(name, 90)
    ptx = kernel.asm["ptx"]
    assert "mul" in ptx
    assert not re.search(r"\bfma\.", ptx)
    assert ".ftz" not in ptx


def test_sums_are_fused_where_the_kernel_says_so() -> None:
    (kernel,) = compiled("one row", 90)
    assert "fma.rn.f32" in kernel.asm["ptx"]


def test_dropout_multiplies_and_adds_in_two_roundings() -> None:
    (kernel,) = compiled("dropout add", 90)
    assert not re.search(r"\bfma\.", kernel.asm["ptx"])


def test_no_seed_causes_a_compilation() -> None:
    from rankwise.ops.triton import elementwise

    for kernel in (elementwise.dropout_kernel, elementwise.dropout_add_kernel):
        words = [parameter for parameter in kernel.params if parameter.name in ("before", "middle", "threshold")]
        assert [parameter.do_not_specialize for parameter in words] == [True] * 3
    assert [elementwise._signed(word) for word in (0, 2**31 - 1, 2**31, 2**32 - 1)] == [0, 2**31 - 1, -(2**31), -1]


def test_every_launch_says_whether_sums_are_fused() -> None:
    """Triton's default changes with its version, and equality to the bit depends on it where weights are packed."""
    exact = {launch.name for name in gpu_kernels._packed_cases() for launch in gpu_kernels.launches(name)}
    exact |= {"dropout", "dropout_add"}
    for name in gpu_kernels.cases():
        for launch in gpu_kernels.launches(name):
            assert launch.keywords["enable_fp_fusion"] is (launch.name not in exact), launch.name
