"""Run `triton_elementwise_cases` in other processes, and compile every kernel as cards that are not here launch it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise import ops
from rankwise.errors import QuantizationError
from rankwise.ops import elementwise, table
from rankwise.ops.elementwise_checks import ACTIVATIONS
from rankwise.ops.packed_weight import PackedWeight

triton = pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_elementwise_cases.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CARDS = {"RTX 3090": 86, "RTX 4090": 89, "H100": 90}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
OPCHECKS = ("test_schema", "test_faketensor")
compiling = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are not compiled")


def run_cases(tmp_path: Path, interpret: str) -> None:
    """Every case passes; none is skipped."""
    source = str(Path(ops.__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": source}
    environment |= {"OMP_NUM_THREADS": "1"} if interpret == "1" else {}
    command = [sys.executable, "-m", "pytest", str(CASES), "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    summary = (done.stdout.strip().splitlines() or [done.stderr])[-1]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "skipped" not in summary


@pytest.mark.slow
def test_kernels_equal_the_reference_under_the_interpreter(tmp_path: Path) -> None:
    run_cases(tmp_path, "1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: compiled kernels cannot run here")
def test_kernels_equal_the_reference_on_a_card(tmp_path: Path) -> None:
    run_cases(tmp_path, "0")


@compiling
def test_cuda_tensors_get_triton_and_cpu_tensors_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKWISE_OPS", raising=False)
    ops.set_implementation("auto")
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "is_cpu", False)
    monkeypatch.setattr(Tensor, "device", torch.device("cuda"))
    assert table.module_for(torch.ones(1, dtype=torch.bfloat16)).__name__ == "rankwise.ops.triton.elementwise"
    monkeypatch.undo()
    assert table.module_for(torch.ones(1, dtype=torch.float16)).__name__ == "rankwise.ops.elementwise_reference"


def bf16(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def four_bit_row_cross(R: int, dtype: torch.dtype, factors: torch.dtype, *, double: bool) -> Tensor:
    from rankwise.ops.triton import row_cross

    N, K = 32, 4096
    codes, blocks = torch.zeros(N, K // 2, dtype=torch.uint8), N * K // 64
    weight = PackedWeight(codes, torch.ones(blocks), (N, K))
    if double:
        nested = (torch.ones(-(-blocks // 256)), torch.ones(()))
        weight = PackedWeight(codes, torch.zeros(blocks, dtype=torch.uint8), (N, K), "nf4", 64, *nested)
    return row_cross.row_cross_4bit(weight, torch.ones(R, K, dtype=factors), torch.ones(N, R), dtype)


def cases() -> dict[str, Callable[[], Any]]:
    """Launches of the sizes of a large layer, as far as these decide how a kernel is compiled."""
    from rankwise.ops.triton import cross_entropy, dropout, glu, low_rank, rms_norm, rope, row_cross, scaled_grad

    g, N, target = torch.ones(32), 32, torch.zeros(16, dtype=torch.int64)
    logits = bf16(16, 8192)
    return {
        "low rank": lambda: low_rank.low_rank_add_(bf16(32, N), bf16(32, 16), bf16(N, 16), 0.5, g, None),
        "low rank 256": lambda: low_rank.low_rank_add_(bf16(32, N), bf16(32, 256), bf16(N, 256), 0.5, g, bf16(N)),
        "low rank float32": lambda: low_rank.low_rank_add_(
            torch.ones(32, N), torch.ones(32, 256), torch.ones(N, 256), 0.5, g, g
        ),
        "scaled grad": lambda: scaled_grad.scaled_grad(bf16(32, N), bf16(32, N), g),
        "scaled grad alone": lambda: scaled_grad.scaled_grad(bf16(32, N), None, g),
        "cross entropy": lambda: cross_entropy.cross_entropy_(logits, target, 1.0, 0.0, None, 1.0, True, False, False),
        "cross entropy with all": lambda: cross_entropy.cross_entropy_(
            logits, target, 1.0, 0.1, 30.0, 1.0, True, True, True
        ),
        **{f"glu {act}": lambda act=act: glu.glu(bf16(32, 64), bf16(32, 64), act) for act in ACTIVATIONS},
        **{
            f"glu {act} backward": lambda act=act: glu.glu_backward(bf16(32, 64), bf16(32, 64), bf16(32, 64), act, True)
            for act in ACTIVATIONS
        },
        "rms norm": lambda: rms_norm.rms_norm(bf16(32, 4096), bf16(4096), 1e-5, 0, True),
        "rms norm of heads": lambda: rms_norm.rms_norm(bf16(32, 128), bf16(128), 1e-5, 1, False),
        "rms norm backward": lambda: rms_norm.rms_norm_backward(
            bf16(32, 4096), bf16(32, 4096), bf16(4096), torch.ones(32), 0, bf16(32, 4096)
        ),
        "rope": lambda: rope.rope(bf16(2, 32, 16, 128), bf16(1, 16, 128), bf16(1, 16, 128), False),
        "rope backward": lambda: rope.rope(bf16(2, 8, 16, 128), *(torch.ones(2, 16, 64) for _ in range(2)), True),
        "dropout": lambda: dropout.dropout(bf16(32, N), 0.1, 7),
        "dropout add": lambda: dropout.dropout_add_(bf16(32, N), bf16(32, N), 0.1, 7),
        "row cross": lambda: row_cross.row_cross(bf16(N, 4096), bf16(16, 4096), bf16(N, 16)),
        "row cross in parts": lambda: row_cross.row_cross(bf16(N, 4096), torch.ones(256, 4096), torch.ones(N, 256)),
        "row cross float32": lambda: row_cross.row_cross(torch.ones(N, 4096), torch.ones(64, 4096), torch.ones(N, 64)),
        "row cross float16": lambda: row_cross.row_cross(
            torch.ones(N, 4096, dtype=torch.float16), torch.ones(64, 4096), torch.ones(N, 64)
        ),
        "packed": lambda: four_bit_row_cross(16, torch.bfloat16, torch.bfloat16, double=False),
        "packed double": lambda: four_bit_row_cross(64, torch.bfloat16, torch.float32, double=True),
        "packed float32": lambda: four_bit_row_cross(64, torch.float32, torch.float32, double=True),
    }


class Launch:
    """Stands for a kernel and keeps the arguments of its last launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arguments, self.keywords = kernel, (), {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.arguments, self.keywords = arguments, keywords

        return launch


def launched(name: str, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """The only launch of a case; nothing runs."""
    from rankwise.ops.triton import cross_entropy, dropout, glu, low_rank, rms_norm, rope, row_cross, scaled_grad

    launches = []
    for module in (cross_entropy, dropout, glu, low_rank, rms_norm, rope, row_cross, scaled_grad):
        monkeypatch.setattr(module, "launching_on", lambda device: nullcontext())
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            launches.append(Launch(getattr(module, kernel)))
            monkeypatch.setattr(module, kernel, launches[-1])
    cases()[name]()
    (launch,) = [launch for launch in launches if launch.arguments]
    return launch


def compiled(launch: Launch, card: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    given = {**dict(zip(names, launch.arguments)), **launch.keywords}
    signature = {name: kind(given[name], given[name] is launch.keywords.get(name, ...)) for name in names}
    constants = {name: given[name] for name in names if signature[name] == "constexpr"}
    numbers = [index for index, name in enumerate(names) if is_aligned(given[name], signature[name])]
    aligned = {(index,): [["tt.divisibility", 16]] for index in numbers}
    options = {key: value for key, value in launch.keywords.items() if key not in names}
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", CARDS[card], 32), options=options)


def kind(value: Any, is_constant: bool) -> str:
    if value is None or is_constant:
        return "constexpr"
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def is_aligned(value: Any, signature: str) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 1
    return signature == "i32" and value % 16 == 0


@compiling
@pytest.mark.parametrize("name", cases() if not INTERPRETED else [])
def test_every_kernel_compiles_without_spilling(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.backends.nvidia")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = launched(name, monkeypatch)
    for card in CARDS:
        kernel, cubin = compiled(launch, card), tmp_path / f"{CARDS[card]}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"STACK:(\d+)", usage) == ["0"], (card, usage)
        # What a block may have of shared memory on the smallest of these cards.
        assert kernel.metadata.shared <= 99 * 1024


@compiling
def test_no_seed_causes_a_compilation() -> None:
    from rankwise.ops.triton import dropout

    for kernel in (dropout.dropout_kernel, dropout.dropout_add_kernel):
        words = [parameter for parameter in kernel.params if parameter.name in ("before", "middle", "threshold")]
        assert [parameter.do_not_specialize for parameter in words] == [True] * 3
    assert [dropout._signed(word) for word in (0, 2**31 - 1, 2**31, 2**32 - 1)] == [0, 2**31 - 1, -(2**31), -1]


@compiling
def test_dropout_multiplies_and_adds_in_two_roundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(launched("dropout add", monkeypatch), "H100").asm["ptx"]
    assert not re.search(r"\bfma\.", ptx)


@pytest.fixture(params=["auto", "reference"])
def chosen(request: pytest.FixtureRequest) -> Any:
    ops.set_implementation(request.param)
    yield request.param
    ops.set_implementation("auto")


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_row_cross_without_triton(dtype: torch.dtype) -> None:
    W, A, B = torch.randn(33, 50).to(dtype), torch.randn(5, 50), torch.randn(33, 5)
    truth = ((W.double() @ A.double().T) * B.double()).sum(1)
    for weight in (W, W.T.contiguous().T):
        torch.testing.assert_close(elementwise.row_cross(weight, A, B).double(), truth, rtol=1e-5, atol=1e-4)
    torch.library.opcheck(torch.ops.rankwise.row_cross.default, (W, A, B), test_utils=OPCHECKS)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("N", "K"), [(9, 128), (3, 7), (0, 64)])
def test_row_cross_4bit_without_triton(N: int, K: int, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.ops import elementwise_reference

    monkeypatch.setattr(elementwise_reference, "CHUNK_ELEMENTS", 256)
    packed = ops.quantize_weight(torch.randn(N, K), double_quant=double)
    A, B = torch.randn(5, K), torch.randn(N, 5)
    W = ops.dequantize_weight(packed, torch.bfloat16)
    truth = ((W.double() @ A.double().T) * B.double()).sum(1)
    found = ops.row_cross_4bit(packed, A, B, torch.bfloat16)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)
    given = (*packed.parts, A, B, torch.bfloat16)
    torch.library.opcheck(torch.ops.rankwise.row_cross_4bit.default, given, test_utils=OPCHECKS)


def test_factors_that_do_not_fit_are_refused() -> None:
    W, A, B = torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2)
    for bad in ((W, A.T, B), (W, A, B.T), (W, A.int(), B), (W[0], A, B)):
        with pytest.raises(QuantizationError, match=r"RW620.*row_cross needs W \(N, K\)"):
            elementwise.row_cross(*bad)
