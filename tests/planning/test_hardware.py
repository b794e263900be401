"""Cards by name, amounts of memory, and this machine."""

from __future__ import annotations

import os
import platform

import psutil
import pytest
import torch

from rankwise.errors import ConfigError
from rankwise.planning import hardware
from rankwise.planning.hardware import CARDS, choose_hardware, cpu_hardware, find_card, parse_size


def test_every_card_is_found_by_its_own_name():
    assert [find_card(card.name) for card in CARDS] == list(CARDS)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("m4 max 64gb", "Apple M4 Max 64GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("A100 SXM 40", "A100 40GB"),
        ("RTX 4060 Ti 16", "RTX 4060 Ti 16GB"),
        ("A6000", "RTX A6000"),
        ("a2000 12gb", "RTX A2000 12GB"),
        ("6000 Ada", "RTX 6000 Ada"),
        ("M3 Max 36GB", "Apple M3 Max 36GB"),
    ],
)
def test_names_as_drivers_and_people_write_them(name, card):
    assert find_card(name).name == card


@pytest.mark.parametrize(
    ("name", "cards"),
    [
        ("A100", ["A100 40GB", "A100 80GB PCIe", "A100 80GB SXM"]),
        ("a100-80", ["A100 80GB PCIe", "A100 80GB SXM"]),
        ("NVIDIA H100", ["H100 PCIe", "H100 SXM", "H100 NVL"]),
        ("M3 Max", ["Apple M3 Max 36GB", "Apple M3 Max 48GB", "Apple M3 Max 128GB"]),
    ],
)
def test_a_name_of_several_cards_asks_which(name, cards):
    with pytest.raises(ConfigError, match="RW141: .* may mean several GPUs") as caught:
        find_card(name)
    for card in cards:
        assert f'--gpu "{card}"' in caught.value.message
        assert find_card(card).name == card


@pytest.mark.parametrize(
    ("name", "close"),
    [("RTX 4095", "RTX 4090"), ("RTX 4090 48GB", "RTX 4090"), ("H101", "H100"), ("4080 ti", "RTX 4080")],
)
def test_an_unknown_card_is_answered_with_the_closest(name, close):
    with pytest.raises(ConfigError, match="RW141") as caught:
        choose_hardware(name, None)
    assert close in caught.value.message


@pytest.mark.parametrize("name", ["", "toaster", "A1000", "???"])
def test_nonsense_is_no_card(name):
    with pytest.raises(ConfigError, match="RW141"):
        find_card(name)


def test_figures_are_of_the_right_size():
    """Published: RTX 4090 has 24 GiB, 1,008 GB/s and 165 TFLOP/s; H100 SXM 3.35 TB/s and 989 TFLOP/s."""
    by_name = {card.name: card for card in CARDS}
    card = by_name["RTX 4090"]
    assert (card.memory_gib, card.gigabytes_per_second, round(card.teraflops)) == (24, 1008, 165)
    assert (by_name["H100 SXM"].gigabytes_per_second, by_name["H100 SXM"].teraflops) == (3350, 989)
    assert all(0.7 < card.usable_bytes / (card.memory_gib * 2**30) < 1 for card in CARDS)
    assert all(card.source for card in CARDS)


@pytest.mark.parametrize(
    "names",
    [
        ("H100 SXM", "GH200", "H200"),
        ("A100 40GB", "A100 80GB PCIe", "A100 80GB SXM"),
        ("V100 16GB", "V100 32GB"),
        ("MI300X", "MI325X"),
        ("RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"),
        ("RTX 5060 Ti 8GB", "RTX 5060 Ti 16GB"),
    ],
)
def test_cards_of_one_chip_compute_as_fast(names):
    assert len({card.teraflops for card in CARDS if card.name in names}) == 1


def test_usable_memory_is_what_torch_reports():
    """Totals out of public out-of-memory reports, in GiB."""
    reported = {"RTX 4090": 23.52, "RTX 5090": 31.36, "A100 40GB": 39.39, "L40": 44.40, "A10": 21.99}
    by_name = {card.name: card.usable_bytes / 2**30 for card in CARDS}
    for name, total in reported.items():
        assert 0.97 * total < by_name[name] <= 1.001 * total, name


def test_memory_alone_and_beside_a_card():
    alone = choose_hardware(None, "24GB")
    assert (alone.memory_bytes, alone.device_type) == (24 * 10**9, choose_hardware(None, None).device_type)
    assert alone.name.startswith("a machine like this one")
    mixed = choose_hardware("RTX 4090", "48GiB")
    assert (mixed.name, mixed.memory_bytes) == ("RTX 4090", 48 * 2**30)
    assert mixed.flops_per_second == choose_hardware("RTX 4090", None).flops_per_second


def test_a_card_without_bfloat16_trains_in_float16():
    assert choose_hardware("T4", None).dtype == "float16"
    assert choose_hardware("L4", None).dtype == "bfloat16"


def test_by_default_this_machine(monkeypatch):
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: False)
    found = choose_hardware(None, None)
    assert (found.kind, found.device_type) == ("machine", "cpu")
    assert 0 < found.memory_bytes <= psutil.virtual_memory().total
    assert found.cores >= 1


def test_a_plan_counts_an_apple_gpu_only_where_a_run_would_take_it(monkeypatch):
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10**9)
    assert [hardware.this_machine(device).device_type for device in ("auto", "mps")] == ["cpu", "mps"]


V1, V2 = hardware.V1, hardware.V2


@pytest.mark.parametrize(
    ("version", "own", "groups", "left"),
    [
        pytest.param(V2, "0::/", {"": (1000, 300, 50)}, 750, id="container"),
        pytest.param(
            V2, "0::/slurm/job/step", {"": None, "slurm/job": (1000, 300, 0), "slurm/job/step": None}, 700, id="slurm"
        ),
        pytest.param(V2, "0::/docker/1f", {"": (1000, 300, 0)}, 700, id="a path of the host"),
        pytest.param(V2, "0::/a/b", {"a": (500, 600, 0), "a/b": (1000, 0, 0)}, 0, id="the tightest"),
        pytest.param(V1, "4:cpu:/b\n3:memory:/a", {"a": (1000, 300, 50), "b": (10, 0, 0)}, 750, id="version 1"),
        pytest.param(V2, "0::/", {"": None}, None, id="no limit"),
    ],
)
def test_memory_limits_of_containers_and_jobs_count(monkeypatch, tmp_path, version, own, groups, left):
    """Of each group: its limit, what it uses, and what of this the kernel frees first."""
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: False)
    monkeypatch.setattr(hardware, "own_bytes", lambda: 0)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(own + "\n")
    for name, numbers in groups.items():
        limit, usage, cached = numbers or ("max", 0, 0)
        group = tmp_path / version.mount / name
        group.mkdir(parents=True, exist_ok=True)
        (group / version.limit).write_text(f"{limit}\n")
        (group / version.usage).write_text(f"{usage}\n")
        (group / "memory.stat").write_text(f"anon 7\n{version.freed_first} {cached}\n")
    found = choose_hardware(None, None)
    if left is None:
        assert found.memory_bytes > 1_000_000
        assert found.note.startswith("available now, of ")
    else:
        assert found.memory_bytes == left
        assert found.note.startswith("left by the memory limit of this container or job, of ")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_only_cores_that_the_process_may_use_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert cpu_hardware().cores == 1


@pytest.mark.parametrize("busy_gb", [0, 30])
def test_of_a_card_here_only_what_is_free_counts(monkeypatch, busy_gb):
    """Another process's memory is not ours; what torch's allocator holds here is."""
    total, held = 80 * 10**9, 2 * 10**9
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    context = hardware.CONTEXT_BYTES
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (total - busy_gb * 10**9 - held - context, total))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: held)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    found = hardware._cuda_device()
    assert found.memory_bytes == total - busy_gb * 10**9
    assert "80.0 GB" in found.note
    assert found.flops_per_second == 989e12


@pytest.mark.parametrize(("gib", "bandwidth"), [(10, 760e9), (12, 912e9)])
def test_the_memory_tells_which_of_two_cards_with_one_name_is_here(monkeypatch, gib, bandwidth):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA GeForce RTX 3080")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (gib * 2**30, gib * 2**30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    assert hardware._cuda_device().bytes_per_second == bandwidth


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere the kernel alone tells")
def test_bfloat16_is_judged_alike_with_and_without_the_kernels_word(monkeypatch, tmp_path):
    from rankwise.models import device

    told = device.cpu_has_bfloat16()
    monkeypatch.setattr(device, "CPU_INFO", tmp_path / "none")
    assert device.cpu_has_bfloat16() == told


# Amounts of memory as people write them.


@pytest.mark.parametrize("text", ["24", "24GB", "24 gb", "24g", "24G", " 24 GB ", "24.0gb", "24000MB", 24])
def test_decimal_gigabytes(text):
    assert parse_size(text) == 24 * 10**9


@pytest.mark.parametrize("text", ["24GiB", "24 gib", "24576 MiB", "24Gib"])
def test_binary_gibibytes_are_kept_apart(text):
    assert parse_size(text) == 24 * 2**30


@pytest.mark.parametrize(
    "text", ["", "0", "0GB", "-3", "24 bananas", "24i", "GB", "1e3", "nan", "inf", "24 GB B", "24000000000", "9" * 400]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="RW140"):
        parse_size(text)
