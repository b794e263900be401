"""``rankwise doctor``: what it finds, what it calls a problem, and how it looks on a narrow terminal."""

from __future__ import annotations

import builtins
from importlib import metadata

import pytest
import torch

from rankwise.cli import doctor
from rankwise.ops import selection
from rankwise.ops.cpu import four_bit, native


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    """The choice of kernels is made anew, and forgotten again."""
    monkeypatch.delenv("RANKWISE_OPS", raising=False)
    monkeypatch.setattr(selection, "_modules", {})
    monkeypatch.setattr(selection, "_choice", None)
    monkeypatch.setattr(selection, "_said", set())


def needing(monkeypatch, *requirements):
    monkeypatch.setattr(metadata, "requires", lambda name: list(requirements))


def test_a_machine_that_works_ends_with_0_and_names_its_kernels(rankwise):
    done = rankwise("doctor", "--json")
    found = done.document
    assert (done.code, found["works"]) == (0, True), done.stderr
    assert found["machine"]["cores"] >= 1
    assert {library["name"]: library["version"] for library in found["libraries"]}["torch"] == torch.__version__
    families = {kernel["family"] for kernel in found["kernels"] if kernel["device"] == "cpu"}
    families_of = {None: {"4-bit weights", "norms, MLPs, losses", "attention", "products"}}
    assert families == families_of.get(native.obstacle(), {"all"})


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_its_terminal(width, rankwise, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("RANKWISE_CPU_LEVEL", native.level())
    text = rankwise("doctor").stdout
    assert max(map(len, text.splitlines())) <= width
    for expected in ("Machine", "Libraries", "Kernels", "What to do", f"RANKWISE_CPU_LEVEL={native.level()}"):
        assert expected in text


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("torch>=99.0", f'torch {metadata.version("torch")} (needs >=99.0); run pip install "torch>=99.0".'),
        ("no-such-library>=1", 'no-such-library (missing); run pip install "no-such-library>=1".'),
    ],
)
def test_a_library_out_of_range_is_a_problem(requirement, said, rankwise, monkeypatch):
    needing(monkeypatch, requirement, 'peft>=99; extra == "peft"')
    done = rankwise("doctor", "--json")
    problems = [finding for finding in done.document["findings"] if finding["is_problem"]]
    assert done.code == 2
    assert [finding["code"] for finding in problems] == ["RW790"]
    assert problems[0]["message"].endswith(said)


def test_a_missing_extra_is_told_and_is_no_problem(rankwise, monkeypatch):
    needing(monkeypatch, "torch>=2", 'no-such-library; extra == "peft"', 'torch>=2; extra == "eval"')
    done = rankwise("doctor", "--json")
    assert done.code == 0
    extras = done.document["extras"]
    assert extras["peft"]["missing"] == ["no-such-library"]
    assert extras["peft"]["install"] == 'pip install "rankwise[peft]"'
    assert extras["eval"]["missing"] == []


def test_torch_that_cannot_be_imported_is_said_with_all_the_rest(rankwise, monkeypatch):
    real = builtins.__import__

    def failing(name, *arguments, **options):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", failing)
    done = rankwise("doctor", "--json")
    assert done.code == 2
    assert "libcudart.so.13" in done.document["findings"][-1]["message"]
    assert done.document["machine"]["processor"]


def test_without_the_native_library_it_says_what_runs_and_how_to_get_it(rankwise, monkeypatch):
    monkeypatch.setattr(native, "_library_path", lambda: None)
    done = rankwise("doctor", "--json")
    assert done.code == 0
    [kernel] = [kernel for kernel in done.document["kernels"] if kernel["device"] == "cpu"]
    assert kernel["runs"] == "plain PyTorch"
    assert [finding["code"] for finding in done.document["findings"]] == ["RW608"]
    assert "C++17 compiler" in done.document["findings"][0]["message"]


def test_a_card_that_torch_cannot_use_is_said(rankwise, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = rankwise("doctor", "--json")
    assert done.code == 0
    assert [finding["code"] for finding in done.document["findings"]] == ["RW791"]


def test_kernels_that_give_other_bits_are_a_problem(rankwise, monkeypatch):
    if native.obstacle() is not None:
        pytest.skip("the native library is not built")
    right = four_bit.dequantize_4bit
    monkeypatch.setattr(four_bit, "dequantize_4bit", lambda weight, dtype: right(weight, dtype) * (1 + 2**-23))
    done = rankwise("doctor", "--json")
    assert done.code == 2
    assert [finding["code"] for finding in done.document["findings"]] == ["RW792"]


@pytest.mark.skipif(native.obstacle() is not None, reason="the native library is not built")
def test_a_lower_level_is_explained(rankwise):
    native.set_level("portable")
    try:
        kernels = {kernel["family"]: kernel for kernel in rankwise("doctor", "--json").document["kernels"]}
    finally:
        native.set_level(None)
    assert kernels["4-bit weights"]["runs"] == "native, portable"
    assert kernels["attention"]["runs"] == kernels["products"]["runs"] == "PyTorch's own"
    assert "AVX2" in kernels["products"]["why"]
