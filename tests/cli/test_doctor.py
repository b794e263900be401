"""``rankwise doctor``: what it finds, what it calls a problem, and how it looks on a narrow terminal."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from marks import LEVELS
from rankwise import ops
from rankwise.cli import doctor
from rankwise.ops.cpu import native


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    """The choice of kernels is made anew, and forgotten again."""
    monkeypatch.delenv("RANKWISE_OPS", raising=False)
    ops.set_implementation(None)
    yield
    ops.set_implementation(None)


def test_a_machine_that_works_ends_with_0_and_names_its_kernels(rankwise):
    done = rankwise("doctor", "--json")
    found = done.document
    assert (done.code, found["findings"]) == (0, []), done.stderr
    assert f"torch {torch.__version__}" in found["libraries"]["needed"]
    assert set(found["kernels"]) == ({"cpu"} if native.obstacle() else {"cpu", "products", "attention"})


def test_it_says_how_much_the_prepared_bases_take(rankwise, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("base-a", "base-b"):
        (tmp_path / "rankwise" / "bases" / name).mkdir(parents=True)
        (tmp_path / "rankwise" / "bases" / name / "model.safetensors").write_bytes(bytes(2_000_000))
    said = rankwise("doctor", "--json").document["machine"]["kept bases"]
    assert said.startswith(f"4.00 MB in {tmp_path / 'rankwise' / 'bases'}; ")


@pytest.mark.parametrize("width", [60, 120])
def test_it_fits_its_terminal(width, rankwise, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = rankwise("doctor").stdout
    assert max(map(len, text.splitlines())) <= width
    for expected in ("Machine", "Libraries", "Kernels", "What to do"):
        assert expected in text


def test_a_library_out_of_range_is_a_problem_and_a_missing_extra_is_none(rankwise, monkeypatch):
    needs = ["torch>=99.0", 'no-such-library; extra == "peft"', 'torch>=2; extra == "eval"']
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    done = rankwise("doctor", "--json")
    assert done.code == 2
    [finding] = done.document["findings"]
    assert finding["code"] == "RW790"
    assert finding["message"].endswith('run pip install "torch>=99.0".')
    assert done.document["libraries"]["peft"] == 'missing: pip install "no-such-library"'
    assert done.document["libraries"]["eval"] == "installed"


def test_without_the_native_library_it_says_what_runs_and_how_to_get_it(rankwise, monkeypatch):
    monkeypatch.setattr(native, "library_path", lambda: None)
    done = rankwise("doctor", "--json")
    assert done.code == 0
    assert done.document["kernels"]["cpu"] == "plain PyTorch"
    [finding] = done.document["findings"]
    assert finding["code"] == "RW608"
    assert "C++17 compiler" in finding["message"]


def test_a_card_that_torch_cannot_use_is_said(rankwise, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = rankwise("doctor", "--json")
    assert done.code == 0
    assert [finding["code"] for finding in done.document["findings"]] == ["RW791"]


@pytest.mark.skipif(native.obstacle() is not None, reason="the native library is not built")
def test_a_lower_level_is_explained(rankwise):
    native.set_level("portable")
    try:
        kernels = rankwise("doctor", "--json").document["kernels"]
    finally:
        native.set_level(None)
    assert kernels["cpu"].startswith("portable by RANKWISE_CPU_LEVEL")
    assert "AVX2" in kernels["attention"]
    assert "AVX2" in kernels["products"]


@pytest.mark.parametrize(("level", "bits"), [("avx2", 11), ("avx_vnni", 8), ("avx512_bf16", 8)])
def test_products_are_named(rankwise, level, bits):
    if level not in LEVELS:
        pytest.skip(f"this CPU and build have no {level}")
    native.set_level(level)
    try:
        products = rankwise("doctor", "--json").document["kernels"]["products"]
    finally:
        native.set_level(None)
    assert products.startswith(f"{level}: ")
    assert products.endswith(f"integers of {bits} bits")
