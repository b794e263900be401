"""Merged Q4_0 files as llama.cpp answers: the share of an adapter's gain that is left, for a plain merge and for a run
with --for-merge q4_0.

    OPTIONS="--model demo --data train.csv --eval-data dev.csv --eval-limit 40 --eval-steps 200 --max-steps 200
        --batch-size 4 --max-length 128 --method lora"                      # 2,399 and 160 rows of E2E
    rankwise train $OPTIONS --seed 0 --output RUNS/lora-0                   # and the seeds 1 and 2
    rankwise train $OPTIONS --seed 0 --for-merge q4_0 --output RUNS/lora-q4_0-0
    python benchmarks/merged_four_bits.py --runs RUNS --data dev.csv --llama-cpp SOURCE

SOURCE is llama.cpp's, with ``llama-quantize`` built in ``build/bin``. With L the mean loss of a token of the answers of
the first rows, as llama.cpp computes it:

    share = (L(base) - L(file)) / (L(base) - L(plain merge in 16 bits))

Prints a table of the seeds; files that exist in RUNS are not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import results

from rankwise.cli.main import main as rankwise
from rankwise.constants import IGNORED
from rankwise.data import encode_rows, read_rows
from rankwise.export.proof import run_server, server_python
from rankwise.models import load_model, load_tokenizer

Rows = tuple[list[list[int]], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=20)
    given = parser.parse_args()
    rows = answers(given.data, given.model, given.rows)
    base = loss(base_file(given.model, given.runs, given.llama_cpp), rows)
    table = []
    for plain in sorted(given.runs.glob("lora-[0-9]")):
        seed = plain.name.rpartition("-")[2]
        whole, short = files_of(plain, given.llama_cpp)
        _, trained = files_of(plain.with_name(f"lora-q4_0-{seed}"), given.llama_cpp)
        found = [loss(file, rows) for file in (whole, short, trained)]
        shares = [f"{(base - item) / (base - found[0]):.3f}" for item in found[1:]]
        table.append([seed, f"{base:.4f}", *(f"{item:.4f}" for item in found), *shares])
        print(table[-1], file=sys.stderr, flush=True)
    heads = ["seed", "base", "merged, 16 bits", "plain merge, Q4_0", "trained for it, Q4_0"]
    tokens = sum(map(len, rows[1]))
    print(f"`{results.command()}`: {tokens} tokens of {len(rows[0])} rows\n")
    print("\n".join(results.table([*heads, "share, plain", "share, trained for it"], table)))


def answers(data: str, model: str, count: int) -> Rows:
    """(token ids of the prompts, of the answers) of the first rows."""
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    items = encode_rows(read_rows(data, split="validation")[:count], tokenizer, max_length=128).dataset
    starts = [next(place for place, label in enumerate(item["labels"]) if label != IGNORED) for item in items]
    split = [(item["input_ids"][:start], item["input_ids"][start:]) for item, start in zip(items, starts)]
    return [prompt for prompt, _ in split], [answer for _, answer in split]


def base_file(name: str, runs: Path, source: Path) -> Path:
    folder = runs / "base"
    if not folder.is_dir():
        model, tokenizer = load_model(name, dtype="auto")
        model.save_pretrained(folder)
        assert tokenizer is not None
        tokenizer.save_pretrained(folder)
    return converted(folder, source)


def files_of(run: Path, source: Path) -> tuple[Path, Path]:
    """The merged run as GGUF in 16 bits, and what ``llama-quantize`` makes of it."""
    merged = run.with_name(f"merged-{run.name}")
    if not merged.is_dir():
        assert rankwise(["merge", "--adapter", str(run), "--output", str(merged)]) == 0
    whole = converted(merged, source)
    short = whole.with_suffix(".q4_0.gguf")
    if not short.is_file():
        subprocess.run([source / "build/bin/llama-quantize", whole, short, "Q4_0"], check=True, stdout=sys.stderr)
    return whole, short


def converted(folder: Path, source: Path) -> Path:
    file = folder / "model.gguf"
    if not file.is_file():
        script = [sys.executable, source / "convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", "f16"]
        subprocess.run(script, check=True, stdout=sys.stderr)
    return file


def loss(file: Path, rows: Rows) -> float:
    prompts, asked = rows
    job = {"server": "llama.cpp", "model": str(file), "adapter": None, "prompts": prompts, "answers": asked}
    told = run_server(server_python("llama.cpp", None), {**job, "new_tokens": 1})
    return -fmean(value for values in told["base"]["logprobs"] for value in values)


if __name__ == "__main__":
    main()
