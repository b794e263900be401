"""``rankwise plan --exact`` and the speeds of a plan, on a model small enough to plan in no time."""

from __future__ import annotations

import json
import math
import re

import pytest

from rankwise.planning import PLANNED, calibration, hardware
from rankwise.planning import plan as planning

ENOUGH, LITTLE = "8GB", "1MB"


@pytest.fixture
def failing(monkeypatch):
    """Let dry runs of some methods fail, as a model's own code may."""
    from rankwise.errors import ModelError

    real = planning.estimate

    def fail(*methods):
        def estimate(place, method, *arguments, **more):
            if method in methods:
                raise ModelError("RW327", f"no step of {method}.")
            return real(place, method, *arguments, **more)

        monkeypatch.setattr(planning, "estimate", estimate)

    return fail


def test_one_method_that_cannot_be_planned_leaves_the_others(plan, failing):
    failing("qlora")
    document = plan("--method", "lora,qlora", "--exact", "--memory", ENOUGH, "--json").document
    assert document["methods"]["lora"]["fits"] is True
    entry = document["methods"]["qlora"]
    assert (entry["fits"], entry["failure"]) == (None, {"code": "RW327", "message": "no step of qlora."})
    assert not any(step["settings"].get("method") == "qlora" for step in document["changes"]["steps"])
    done = plan("--method", "lora,qlora", "--exact", "--memory", LITTLE)
    assert done.code == 0
    assert "cannot be planned: RW327: no step of qlora." in " ".join(done.stdout.split())


def test_where_no_method_can_be_planned_the_first_reason_is_the_error(plan, failing):
    failing("lora", "qlora")
    done = plan("--method", "lora,qlora", "--exact", "--memory", ENOUGH)
    assert done.code == 2
    assert "RW327: no step of lora." in done.stderr


def test_dry_runs_tell_how_they_get_on_beside_the_document(plan, failing):
    failing("qlora")
    done = plan("--method", "lora,qlora,dora", "--exact", "--memory", ENOUGH, "--json")
    assert set(json.loads(done.stdout)["methods"]) == {"lora", "qlora", "dora"}
    said = [line for line in done.stderr.splitlines() if line.startswith(("dry run of", "lora:", "qlora:", "dora:"))][
        :6
    ]
    assert [line.split(":")[0].split(" ...")[0] for line in said] == [
        *("dry run of lora", "lora", "dry run of qlora", "qlora", "dry run of dora", "dora")
    ]
    assert said[3] == "qlora: RW327: no step of qlora."
    assert re.fullmatch(r"dora: \d+ MB, fits \(\d+\.\d s\)", said[5])
    assert not any(line in plan("--method", "lora", "--exact", "--memory", ENOUGH).stdout.splitlines() for line in said)


@pytest.mark.parametrize(("late", "fits"), [(2, None), (1, True)])
def test_a_slow_method_waits_until_the_others_are_done(plan, monkeypatch, late, fits):
    """Its dry run gives up; where it does so again, its row has the reason."""
    real = planning.estimate
    asked = []

    def estimate(place, method, *arguments, deadline, **more):
        asked.append(method)
        is_late = method == "lora" and asked.count("lora") <= late
        return real(place, method, *arguments, deadline=-math.inf if is_late else deadline, **more)

    monkeypatch.setattr(planning, "estimate", estimate)
    done = plan("--method", "lora,qlora", "--exact", "--memory", ENOUGH, "--json")
    assert asked == ["lora", "qlora", "lora"]
    methods = json.loads(done.stdout)["methods"]
    assert (methods["qlora"]["fits"], methods["lora"]["fits"]) == (True, fits)
    assert "lora: RW135 after 60 s" in done.stderr
    if fits is None:
        assert methods["lora"]["failure"]["code"] == "RW135"


def test_one_method_alone_has_no_limit(plan, monkeypatch):
    asked = []

    def estimate(*arguments, deadline, **more):
        asked.append(deadline)
        return real(*arguments, deadline=deadline, **more)

    real = planning.estimate
    monkeypatch.setattr(planning, "estimate", estimate)
    assert plan("--method", "lora", "--exact", "--memory", ENOUGH).code == 0
    assert asked == [math.inf]


def test_hours_of_a_known_run(plan):
    document = plan("--gpu", "RTX 4090", "--rows", 1000, "--epochs", 2, "--json").document
    assert document["run_tokens"] == 2000 * 64
    entry = document["methods"]["lora"]
    assert entry["seconds"] == pytest.approx(2000 * 64 / entry["tokens_per_second"])
    assert "assumed" in document["pace"]


def test_a_damaged_file_of_timings_is_said_and_passed_over(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_may_have_gpu", lambda: False)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "machine.json").write_text("{")
    done = plan()
    assert done.code == 0
    assert "RW144" in done.stderr


def test_what_was_measured_here_is_used(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_may_have_gpu", lambda: False)
    found = hardware.this_machine()
    pace = {"flops_per_second": 1e12, "bytes_per_second": None}
    entry = {"methods": dict.fromkeys(PLANNED, pace), "date": "2026-01-01", "threads": 1, "torch": "2.13"}
    (tmp_path / "cache").mkdir()
    machines = {f"{found.name}, {found.dtype}": entry}
    (tmp_path / "cache" / "machine.json").write_text(json.dumps({"schema": calibration.SCHEMA, "machines": machines}))
    document = plan("--json").document
    assert "measured on this machine on 2026-01-01" in document["pace"]


def test_of_several_sources_of_speed_each_is_named(plan, tmp_path, monkeypatch):
    """Hours of one method may be measured and those of another assumed: the reader is told which."""
    monkeypatch.setattr(hardware, "_may_have_gpu", lambda: False)
    found = hardware.this_machine()
    pace = {"flops_per_second": 1e12, "bytes_per_second": None}
    entry = {"methods": {"lora": pace}, "date": "2026-01-01", "threads": 1, "torch": "2.13"}
    (tmp_path / "cache").mkdir()
    machines = {f"{found.name}, {found.dtype}": entry}
    (tmp_path / "cache" / "machine.json").write_text(json.dumps({"schema": calibration.SCHEMA, "machines": machines}))
    basis = plan("--method", "lora,dora", "--json").document["pace"]
    assert basis.startswith("lora: measured on this machine")
    assert "; dora: assumed" in basis
