"""What several processes share and refuse. No process is launched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

import rankwise as rw
from rankwise.config import TrainSettings
from rankwise.conflicts import check_conflicts
from rankwise.errors import ConfigError, RunError
from rankwise.training import ranks, run, setup
from rankwise.training.checkpoints import save_checkpoint
from rankwise.training.parts import Given
from rankwise.training.ranks import check_alike
from rankwise.training.setup import with_adapters_options
from rankwise.training.watch import SilentObserver
from rankwise.training.weights import shard
from several import LAUNCHERS
from tiny_models import tiny_llama


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_shares_are_as_even_as_can_be(rows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: count)
    parts = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(ranks.share(list(range(rows))))
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


LAUNCHED = dict(zip(LAUNCHERS, ("1", "2", "1", "2", "localhost", "29500")))
PLACE = ranks.Place(rank=1, count=2, local_rank=1, local_count=2)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def write(**values: str) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return write


def test_the_place_is_read_from_torchruns_environment(environment: Callable[..., None]) -> None:
    environment(**LAUNCHED)
    assert ranks.place() == PLACE
    assert not ranks.is_writer()
    environment(WORLD_SIZE="1", RANK="0")
    assert ranks.place() is None
    assert ranks.is_writer()


BROKEN = [
    ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR="),
    ({"RANK": "2"}, "RANK=2"),
]


@pytest.mark.parametrize(("changes", "words"), BROKEN, ids=str)
def test_a_broken_environment_is_refused(changes: dict[str, str], words: str, environment: Callable[..., None]) -> None:
    environment(**{**LAUNCHED, **changes})
    with pytest.raises(ConfigError, match=f"RW136.*{words}"):
        ranks.place()


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (dist.DistBackendError("no answer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("gloo"), False),
    ],
    ids=repr,
)
def test_errors_of_communication_alone_mean_that_a_process_is_lost(
    error: Exception, is_lost: bool, environment: Callable[..., None]
) -> None:
    environment()
    with pytest.raises(RunError if is_lost else type(error)) as caught, ranks._naming_lost_processes(PLACE):
        raise error
    if is_lost:
        assert caught.value.message.startswith("process 1 of 2 has lost the others")


def test_of_processes_that_fail_the_first_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert ranks.claim_the_report()
    store = dist.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        assert [ranks.claim_the_report() for _ in range(3)] == [True, False, False]


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"model": "demo", "data": "stdlib", "output": Path("run"), **changes})


@pytest.mark.parametrize(
    ("changes", "processes", "code"),
    [
        ({"devices": 2}, 4, "RW137"),
        ({"devices": 2}, 1, "RW137"),
        ({"strategy": "ddp"}, 1, "RW112"),
        ({"method": "prefix"}, 2, "RW112"),
        ({"strategy": "fsdp", "method": "full", "optimizer": "adafactor"}, 2, "RW112"),
        ({"strategy": "fsdp", "products": "int8"}, 2, "RW112"),
        ({"objective": "dpo", "init": "pissa", "products": "int8"}, 1, "RW112"),
    ],
)
def test_options_that_do_not_go_with_the_processes_are_refused(
    changes: dict[str, Any], processes: int, code: str
) -> None:
    with pytest.raises(ConfigError, match=code):
        ranks.check_processes(settings(**changes), processes)
    ranks.check_processes(settings(), processes)


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "pissa"},
        {"init": "loftq", "method": "qlora"},
        {"new_tokens": "<a>,<b>"},
        {"enable_lora": "c_attn=1:0:1", "method": "dora"},
    ],
    ids=str,
)
def test_what_needs_whole_weights_is_refused_under_fsdp(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"RW112: --(init|new-tokens|enable-lora).*--strategy fsdp does not read"):
        check_conflicts(settings(strategy="fsdp", **changes), 2)
    check_conflicts(settings(strategy="ddp", **changes), 2)


def test_an_adapter_with_new_tokens_is_refused_under_fsdp(tmp_path: Path) -> None:
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]))
    rw.save_adapter(model, tmp_path)
    with_adapters_options(settings(adapter=tmp_path, strategy="ddp"))
    with pytest.raises(ConfigError, match=r"RW112: --adapter .* has new tokens"):
        with_adapters_options(settings(adapter=tmp_path, strategy="fsdp"))


def test_a_model_of_unknown_layers_is_not_sharded() -> None:
    model = tiny_llama()
    model._no_split_modules = None
    with pytest.raises(ConfigError, match="RW148: --strategy fsdp shards by layer, and LlamaForCausalLM"):
        shard(model, None, trains_all=False)  # type: ignore[arg-type]


def test_an_apple_gpu_is_one_device() -> None:
    with pytest.raises(ConfigError, match="RW139"):
        ranks.check_cards("mps", 2)
    ranks.check_cards("cpu", 64)


def test_every_file_that_the_processes_read_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"train": {"sha256": "a", "tokens": 3, "chat_template_sha256": "b", "rewards_sha256": "c"}}
    facts = {"sha256": "d"}
    found: list[dict[str, object]] = []
    monkeypatch.setattr(ranks, "check_alike", found.append)
    run._check_alike(data, facts, {})
    for key in data["train"]:
        run._check_alike({"train": {**data["train"], key: "other"}}, facts, {})
        # As another process would have it.
        monkeypatch.setattr(ranks, "gathered", lambda value: [value, found[-1]])
        with pytest.raises(RunError, match="RW700"):
            check_alike(found[0])


def test_all_resume_from_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_checkpoint(tmp_path, 4, lambda folder: None)
    assert run._checkpoint_to_resume(tmp_path) == checkpoint
    monkeypatch.setattr(ranks, "gathered", lambda value: [value, dict.fromkeys(value, 2)])
    with pytest.raises(RunError, match="RW700.* step of the last checkpoint is 2 in process 1 and 4 in process 0"):
        run._checkpoint_to_resume(tmp_path)


def test_no_process_loads_the_model_before_all_have_measured_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    plan: Any = SimpleNamespace(before_loading=lambda *_: calls.append("measured"))
    monkeypatch.setattr(setup, "read_data", lambda *given: setup.Texts(SimpleNamespace(kind="text"), None, None))
    monkeypatch.setattr(ranks, "barrier", lambda: calls.append("all have"))

    def load(*given: Any) -> Any:
        assert calls == ["measured", "all have"]
        raise KeyError("loaded")

    monkeypatch.setattr(setup, "load_for_training", load)
    with pytest.raises(KeyError, match="loaded"):
        run._prepare(settings(learning_rate=0.1), "new", None, 0.1, SilentObserver(), plan, None, Given())


def test_the_answers_of_kto_are_compared_within_each_process() -> None:
    check_conflicts(settings(objective="kto", batch_size=2), 2)
    with pytest.raises(ConfigError, match="RW112.*--batch-size is 1"):
        check_conflicts(settings(objective="kto", batch_size=1), 2)
