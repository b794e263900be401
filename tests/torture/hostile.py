"""Hostile files by the hundred thousand: every reader gives what it read or one coded error, soon and in little memory.

    python tests/torture/hostile.py --seed 1 --count 100000 --only gguf,yaml

Each input is a sound file, or one of a grammar, damaged by its structure, and has a number: the same seed and number
give the same bytes. Every reader runs in a process of its own, so that a crash is counted and not suffered. Prints one
JSON line for each: inputs, those that loaded, refusals by code, the slowest one, and what went wrong.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import safetensors
import torch
from hostile_more import more_readers
from hostile_reader import TEMPLATE_SECONDS, Draw, Reader, damaged
from safetensors.torch import save

from damage import (
    TooSlowError,
    cut,
    damaged_json,
    damaged_lines,
    damaged_safetensors,
    damaged_values,
    damaged_yaml,
    limited,
    with_another_byte,
)
from data.tiny_tokenizers import CHATML, CLOSED, MARKED, UNSTABLE, byte_tokenizer
from rankwise.adapters import add_adapter, save_adapter
from rankwise.adapters.checkpoint import read_adapter
from rankwise.config import TrainSettings
from rankwise.data import encode_rows, read_rows, rows_from_records
from rankwise.errors import RankwiseError
from rankwise.foreign import checked, read_json
from rankwise.lora_config import LoraConfig
from rankwise.models.folder import read_config
from rankwise.models.gguf_file import read_gguf_header
from rankwise.ops.four_bit import quantize_weight
from rankwise.planning.architectures import shape_of
from rankwise.quantization.bitsandbytes_format import from_bitsandbytes, to_bitsandbytes
from rankwise.records import RunRecord, load_record, read_metrics
from rankwise.reports.folder import load_comparison
from rankwise.settings_file import read_settings
from rankwise.training.checkpoints import list_checkpoints, newest_valid, save_checkpoint
from rankwise.training.state import TrainerFacts, check_random_states, load_state, random_states, save_state
from rankwise.weights_file import read_header
from reports.comparison_folders import write_comparison
from tiny_models import tiny_llama

HANGS_SECONDS = 30
MEMORY_BYTES = 200_000_000


def readers(folder: Path) -> dict[str, Reader]:
    """All of them; what is sound is made in ``folder``."""
    return {**_of_weights(folder), **_of_runs(folder), **_of_settings(), **_of_data(), **more_readers(folder)}


# --- weights ---


def _of_weights(folder: Path) -> dict[str, Reader]:
    tensors = {"a.weight": torch.ones(4, 3), "b": torch.zeros(7, dtype=torch.uint8), "c": torch.ones(2).bfloat16()}
    weights = save(tensors, {"format": "pt"})
    model = tiny_llama(num_hidden_layers=1)
    add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True))
    save_adapter(model, folder / "adapter", base_model="base")
    config = (folder / "adapter" / "adapter_config.json").read_bytes()
    pairs = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    skeleton = tiny_llama(num_hidden_layers=1)

    def adapter_config(draw: Draw, place: Path) -> None:
        damaged(config, "adapter_config.json", damaged_json)(draw, place)
        (place / "adapter_model.safetensors").write_bytes(pairs)

    def adapter_weights(draw: Draw, place: Path) -> None:
        damaged(pairs, "adapter_model.safetensors", damaged_safetensors, damaged_values)(draw, place)
        (place / "adapter_config.json").write_bytes(config)

    model_config = json.dumps(tiny_llama().config.to_dict()).encode()
    return {
        "safetensors": Reader(damaged(weights, "w.safetensors", damaged_safetensors), read_weights),
        "gguf": Reader(write_gguf, lambda place: read_gguf_header(place / "w.gguf")),
        "adapter configuration": Reader(adapter_config, lambda place: read_adapter(skeleton, place)),
        "adapter weights": Reader(adapter_weights, lambda place: read_adapter(skeleton, place)),
        "4-bit states": Reader(write_four_bit(), read_four_bit),
        "model configuration": Reader(damaged(model_config, "config.json", damaged_json), read_model_config),
    }


def read_weights(place: Path) -> None:
    """What our check lets pass the library opens too."""
    header = read_header(place / "w.safetensors")
    with safetensors.safe_open(place / "w.safetensors", "pt") as file:
        assert set(file.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == info.shape


def read_model_config(place: Path) -> None:
    shape_of(read_config(place), str(place))


def write_four_bit() -> Callable[[Draw, Path], None]:
    weight = quantize_weight(torch.randn(64, 32), "nf4", 64, True)
    parts = to_bitsandbytes("w", weight)
    state = next(name for name in parts if "quant_state" in name)
    document = bytes(parts[state].tolist())

    def write(draw: Draw, place: Path) -> None:
        changed = dict(parts)
        kind, name = draw.random(), draw.choice(sorted(parts))
        if kind < 0.6:
            content = damaged_json(draw, document)
            changed[state] = torch.tensor(list(content), dtype=torch.uint8)
        elif kind < 0.7:
            del changed[name]
        elif kind < 0.8:
            changed[name.replace("nf4", "fp4") if name == state else f"{name}x"] = changed.pop(name)
        elif kind < 0.9:
            changed[name] = changed[name].to(draw.choice([torch.float16, torch.int64, torch.uint8, torch.float64]))
        else:
            size = changed[name].numel() * draw.choice([0, 1, 2]) + draw.choice([0, 1])
            changed[name] = torch.resize_as_(changed[name].clone(), torch.empty(size, dtype=changed[name].dtype))
        torch_free = {key: (str(value.dtype), value.flatten().tolist()) for key, value in changed.items()}
        (place / "parts.json").write_text(json.dumps(torch_free))

    return write


def read_four_bit(place: Path) -> None:
    stored = json.loads((place / "parts.json").read_text())
    from_bitsandbytes({name: torch.tensor(v, dtype=getattr(torch, d[6:])) for name, (d, v) in stored.items()}, "w")


def write_gguf(draw: Draw, place: Path) -> None:
    """A header by its grammar, every length and type of which may be another."""

    def number(sound: int, code: str = "Q") -> bytes:
        odd = draw.choice([0, 1, sound + 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, draw.randrange(2**20)])
        value = odd if draw.random() < 0.03 else sound
        return struct.pack(f"<{code}", value % 2 ** (8 * struct.calcsize(f"<{code}")))

    def text(content: bytes) -> bytes:
        return number(len(content)) + content

    def value(kind: int) -> bytes:
        if kind == 8:
            return text(draw.choice([b"llama", b"", b"\xff", b"x" * 300, "é".encode()]))
        if kind == 9:
            inner, count = draw.choice([0, 4, 5, 6, 8, 9, 12, 99]), draw.randrange(4)
            return number(inner, "I") + number(count) + b"".join(value(inner) for _ in range(count) if inner != 9)
        return draw.randbytes({0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4))

    keys = [b"general.architecture", *draw.sample([b"a", b"a", b"general.alignment", b"\xff", b"llama.block_count"], 2)]
    kinds = [8, *(draw.choice([0, 4, 5, 6, 7, 8, 9, 10, 12, 13]) for _ in keys[1:])]
    entries = b"".join(text(key) + number(kind, "I") + value(kind) for key, kind in zip(keys, kinds))
    tensors, offset = b"", 0
    names = draw.sample([b"token_embd.weight", b"blk.0.attn_q.weight", b"x", b"x"], draw.randrange(4))
    for name in names:
        shape = [draw.choice([32, 64, 1, 0, 2**40]) if draw.random() < 0.2 else 32 for _ in range(draw.randrange(1, 4))]
        kind = draw.choice([0, 1, 2, 8, 12, 30, 99])
        tensors += text(name) + number(len(shape), "I") + b"".join(map(number, shape))
        tensors += number(kind, "I") + number(offset)
        offset += draw.choice([128, 128, 128, 0])
    start = b"GGUF" + number(3, "I") + number(len(names)) + number(len(keys))
    content = start + entries + tensors
    content += bytes(-len(content) % 32) + bytes(draw.choice([offset, 0, 4096]))
    (place / "w.gguf").write_bytes(cut(draw, content) if draw.random() < 0.05 else content)


# --- runs ---


def _of_runs(folder: Path) -> dict[str, Reader]:
    optimizer = {"state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    facts = {"epoch": 1.0, "global_step": 2, "max_steps": 4, "eval_steps": 1, "log_history": [{"loss": 1.0, "step": 1}]}

    def write_state(place: Path) -> None:
        save_state(place, "optimizer", optimizer)
        save_state(place, "random", random_states())
        (place / "trainer_state.json").write_text(json.dumps(facts))

    whole = save_checkpoint(folder / "run", 2, write_state).path
    files = {path.name: path.read_bytes() for path in whole.iterdir()}

    def checkpoint(name: str, *how: Callable[[Draw, bytes], bytes]) -> Callable[[Draw, Path], None]:
        def write(draw: Draw, place: Path) -> None:
            for other, content in files.items():
                (place / other).write_bytes(content)
            damaged(files[name], name, *how)(draw, place)

        return write

    def read_state(place: Path) -> None:
        load_state(place, "optimizer", like=optimizer)
        try:
            check_random_states(load_state(place, "random"))
            checked(TrainerFacts, read_json(place / "trainer_state.json"))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # These the readers of a run turn into RW511, as `reading_state` does.
            raise RankwiseError("RW511", str(error)[:500]) from None

    def manifest(draw: Draw, place: Path) -> None:
        step = place / "checkpoints" / "step-2"
        step.mkdir(parents=True)
        checkpoint("manifest.json", damaged_json)(draw, step)

    known = {"settings": {"model": "m", "r": 4}, "data": {"train": {"rows": 3}}, "device": {"type": "cpu"}}
    record = json.dumps(RunRecord("lora", 0, files=["adapter_config.json"], **known).to_json()).encode()
    write_comparison(folder / "comparison")
    compared = (folder / "comparison" / "comparison.json").read_bytes()
    lines = b"".join(json.dumps({"step": n, "loss": 1.5, "lr": 0.1}).encode() + b"\n" for n in range(4))
    return {
        "run.json": Reader(damaged(record, "run.json", damaged_json), load_record),
        "metrics": Reader(damaged(lines, "metrics.jsonl", damaged_lines), lambda place: list(read_metrics(place))),
        "manifest": Reader(manifest, read_manifest),
        "optimizer's JSON": Reader(checkpoint("optimizer.json", damaged_json), read_state),
        "optimizer's tensors": Reader(checkpoint("optimizer.safetensors", damaged_safetensors), read_state),
        "random states": Reader(checkpoint("random.json", damaged_json), read_state),
        "trainer's state": Reader(checkpoint("trainer_state.json", damaged_json), read_state),
        "comparison": Reader(damaged(compared, "comparison.json", damaged_json), load_comparison, share=0.2),
    }


def read_manifest(place: Path) -> None:
    (found,) = list_checkpoints(place)
    newest_valid(place, lambda error: None)
    # Nothing but the folder that was written is ever named.
    assert found.path.parent == place / "checkpoints"


# --- settings ---


def _of_settings() -> dict[str, Reader]:
    given = {"model": "m", "data": "d", "r": 4, "rank-pattern": "q_proj=2", "learning-rate": 1e-4, "epochs": 1.5}
    given |= {"target-modules": "[q_proj, v_proj]", "seed": 3, "use-rslora": "true", "dtype": "float32"}
    text = "".join(f"{key}: {value}\n" for key, value in given.items()).encode()
    return {"yaml": Reader(damaged(text, "run.yaml", damaged_yaml), read_yaml)}


def read_yaml(place: Path) -> None:
    read_settings(TrainSettings, place / "run.yaml", {"output": place / "out"})


# --- data and templates ---

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
RECORDS: tuple[dict[str, Any], ...] = (
    {"prompt": "q", "completion": "a"},
    {"messages": MESSAGES},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "tools": [{"name": "f", "parameters": {"type": "object"}}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "q", "input": "", "output": "a"},
    {"text": "words"},
    {"meaning_representation": "name[x]", "human_reference": "x is"},
)


def _of_data() -> dict[str, Reader]:
    tokenizer = byte_tokenizer()
    rows = rows_from_records([(1, RECORDS[1])], "rows.jsonl")

    def encode(place: Path) -> None:
        template = (place / "template.jinja").read_text(encoding="utf-8", errors="replace")
        encode_rows(rows, tokenizer, max_length=64, chat_template=template)

    return {
        "rows": Reader(write_rows, lambda place: read_rows(next(place.iterdir()))),
        "templates": Reader(write_template, encode, seconds=TEMPLATE_SECONDS, share=0.02),
    }


def write_rows(draw: Draw, place: Path) -> None:
    record = draw.choice(RECORDS)
    kind = draw.choice(["jsonl", "jsonl", "json", "csv", "tsv", "parquet", "txt", "jsonl.gz"])
    lines = "".join(json.dumps(draw.choice(RECORDS) if draw.random() < 0.1 else record) + "\n" for _ in range(3))
    content = lines.encode()
    if kind.startswith("jsonl"):
        content = damaged_lines(draw, content)
    elif kind == "json":
        content = damaged_json(draw, json.dumps([record, record]).encode())
    elif kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        quoted = draw.choice(['"{}"', "{}", '"{}', "'{}'", '{}"'])
        content = comma.join(record).encode() + b"\n" + comma.join(quoted.format(v) for v in record.values()).encode()
    elif kind == "parquet":
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record] * 3), stream)
        content = stream.getvalue()
    if kind.endswith(".gz"):
        content = gzip.compress(content)
    if kind == "parquet" or draw.random() < 0.3:
        content = draw.choice([cut, with_another_byte, with_a_changed_end])(draw, content or b" ")
    (place / f"rows.{kind}").write_bytes(content)


def with_a_changed_end(draw: Draw, content: bytes) -> bytes:
    """Parquet and gzip keep their sizes there."""
    changed = bytearray(content)
    for _ in range(3):
        changed[-1 - draw.randrange(min(len(changed), 60))] = draw.randrange(256)
    return bytes(changed)


EXPRESSIONS = (
    *("1 / 0", "messages[9].content", "nothing.at.all", "range(10**9) | list", "'x' * 10**7", "2 ** 999999"),
    *("messages | map(attribute='content') | join", "''.__class__.__mro__", "messages.__init__.__globals__"),
    *("cycler.__init__.__globals__.os.popen('touch /tmp/rankwise-was-here')", "self", "namespace(a=1)", "loop.index"),
    *("messages | tojson", "raise_exception('no')", "'%s' % messages", "'{0.__class__}'.format(1)", "bos_token * 3"),
    *("strftime_now('%Y')", "messages | random", "dict(a=1).a", "lipsum(n=100)", "[1, 2] | sum", "'\ud7ff'"),
)
STATEMENTS = (
    *("{{% for m in messages %}}{{{{ {} }}}}{{% endfor %}}", "{{% if {} %}}x{{% endif %}}", "{{{{ {} }}}}"),
    *("{{% set x = {} %}}{{{{ x }}}}", "{{% macro f(a) %}}{{{{ f({}) }}}}{{% endmacro %}}{{{{ f(1) }}}}"),
    *("{{% for i in range(999) %}}{{{{ {} }}}}{{% endfor %}}", "{{% include {} %}}", "{{% generation %}}{{{{ {} }}}}"),
    *("{{% filter upper %}}{{{{ {} }}}}{{% endfilter %}}", "{{% call f() %}}{{{{ {} }}}}{{% endcall %}}", "{{{{ {}"),
)


def write_template(draw: Draw, place: Path) -> None:
    template = draw.choice([CHATML, MARKED, UNSTABLE, CLOSED, ""])
    for _ in range(draw.randrange(3)):
        odd = draw.choice(STATEMENTS).format(draw.choice(EXPRESSIONS))
        at = draw.randrange(len(template) + 1)
        template = template[:at] + odd + template[at:]
    if draw.random() < 0.3 and template:
        template = with_another_byte(draw, template.encode()).decode(errors="replace")
    (place / "template.jinja").write_text(template, encoding="utf-8", errors="replace")


# --- trying them ---


def fault_of(reader: Reader, draw: Draw, place: Path, found: dict[str, Any]) -> str | None:
    """What is wrong with how one input is read; notes what became of it in ``found``."""
    reader.write(draw, place)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        with limited(HANGS_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(place)
        found["loaded"] += 1
    except RankwiseError as error:
        found["refused"][error.code] += 1
        if error.code == "RW900" or not re.fullmatch(r"RW\d{3}", error.code):
            return f"a fault of ours: {error}"
        if "Traceback" in error.message:
            return f"{error.code} holds a traceback: {error.message[:200]}"
    except TooSlowError:
        return f"takes more than {HANGS_SECONDS} s"
    except Exception as error:  # noqa: BLE001  what comes without a code is what is looked for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    seconds = time.process_time() - began
    found["slowest_seconds"] = max(found["slowest_seconds"], round(seconds, 3))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if seconds > reader.seconds:
        return f"takes {seconds:.1f} s of processor time"
    return f"takes {grown / 1e6:,.0f} MB of memory" if grown > MEMORY_BYTES else None


def try_reader(name: str, reader: Reader, numbers: Sequence[int], seed: int, place: Path) -> dict[str, Any]:
    """All these inputs, in this process."""
    found: dict[str, Any] = {"reader": name, "inputs": len(numbers), "loaded": 0, "slowest_seconds": 0.0}
    found |= {"refused": collections.Counter(), "problems": []}
    for number in numbers:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place.parent / "number").write_text(str(number))
        fault = fault_of(reader, random.Random(f"{seed} {name} {number}"), place, found)
        if fault is not None:
            found["problems"].append(f"input {number}: {fault}")
    return found


def in_a_process(name: str, reader: Reader, count: int, seed: int, folder: Path) -> dict[str, Any]:
    child = os.fork()
    if not child:
        code = 1
        try:
            found = try_reader(name, reader, range(count), seed, folder / "input")
            (folder / "found.json").write_text(json.dumps(found))
            code = 0
        finally:
            # Without the parent's cleaning up.
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        number = (folder / "number").read_text()
        return {"reader": name, "inputs": int(number), "problems": [f"input {number}: ended the process ({code})"]}
    return json.loads((folder / "found.json").read_text())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1000, help="inputs for each reader")
    parser.add_argument("--only", default="")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    total = problems = 0
    # In memory where the system has such a folder: a million files are written and removed.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        for kind, reader in readers(folder).items():
            if given.only and kind not in given.only.split(","):
                continue
            began = time.monotonic()
            count = max(1, int(given.count * reader.share))
            found = in_a_process(kind, reader, count, given.seed, folder)
            found["seconds"] = round(time.monotonic() - began, 1)
            total, problems = total + found["inputs"], problems + len(found["problems"])
            found["problems"] = found["problems"][:10]
            print(json.dumps(found), flush=True)
    print(f"{total:,} inputs, {problems:,} problems")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
