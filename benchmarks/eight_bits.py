"""Steps with frozen products in 8 bits beside those in bfloat16, PEFT's, and the frozen bfloat16 products alone.

    python benchmarks/eight_bits.py                        # the demo model, every method
    python benchmarks/eight_bits.py MODEL --methods lora   # a folder of any model; some methods
    python benchmarks/eight_bits.py --no-peft --rounds 15  # ours alone, on a busy machine
    python benchmarks/eight_bits.py --runs DIR             # losses of finished runs of METHOD and METHOD+int8
    python benchmarks/eight_bits.py --outliers 300 DIR     # write the demo model with made-up outliers, to train on
    python benchmarks/eight_bits.py MODEL --head DATA      # errors of logits in 8 bits, and of their gradient

One process calls all contenders in turn. In steps as short as those in which `train` does so, dense weights are rounded
once and kept. The seconds are those of the calling thread: set OMP_NUM_THREADS=1 on a busy machine, where waiting for
other programs then does not count. Prints medians and minima of the rounds; writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contenders
import results
import steps
import timing
import torch
from scipy import stats
from torch import Tensor

import rankwise as rw
from rankwise.acceleration import keep_rounded
from rankwise.constants import MOST_ROUNDED_ONCE
from rankwise.data import encode_rows, read_rows
from rankwise.ops import eight_bit
from rankwise.ops.linear_cross_entropy import linear_cross_entropy
from rankwise.records import load_record

PRODUCTS = ("bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="folder of a model, or demo")
    parser.add_argument("--methods", nargs="+", choices=contenders.METHODS, default=list(contenders.METHODS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=contenders.DTYPES, default="bfloat16")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--runs", type=Path, help="folder of `rankwise compare --methods lora,lora+int8,...`")
    parser.add_argument("--outliers", nargs=2, metavar=("SIZE", "DIR"))
    parser.add_argument("--head", metavar="DATA", help="rows of text")
    given = parser.parse_args()
    if given.outliers is not None:
        write_outliers(float(given.outliers[0]), given.outliers[1])
        return
    if given.head is not None:
        print_head(given.model, given.head)
        return
    if given.runs is not None:
        print_losses(given.runs)
        return
    contenders.silence()
    print(f"`{results.command()}` on {results.machine()['processor']}\n")
    rows = []
    with contenders.model_folder(given.model) as folder:
        for method in given.methods:
            seconds = measure(folder, method, given)
            for middle in (statistics.median, min):
                took = {name: middle(values) for name, values in seconds.items()}
                against_peft = [f"{took['peft'] / took[name]:.2f}" if "peft" in took else "" for name in PRODUCTS]
                ratios = [f"{took[name] / took['floor']:.2f}" for name in PRODUCTS]
                rows.append([method, middle.__name__, f"{took['floor']:.3f}", *ratios, *against_peft])
            gc.collect()
    headings = ["method", "of rounds", "floor, s", *(f"{name} / floor" for name in PRODUCTS)]
    headings += [f"{name}: times as fast as PEFT" for name in PRODUCTS]
    print("\n".join(results.table(headings, rows)))


def print_losses(folder: Path) -> None:
    """The evaluation loss of each pair of runs that differ only in their products, and the mean change.

    Runs of one seed share their rows, so the interval is that of the seeds' means.
    """
    changes: dict[str, list[float]] = {}
    rows = []
    for run in sorted((folder / "runs").glob("*+int8-*")):
        method, _, seed = run.name.rpartition("-")
        plain, eight = (load_record(path).eval_loss for path in (run.with_name(run.name.replace("+int8", "")), run))
        assert plain is not None
        assert eight is not None
        changes.setdefault(seed, []).append(eight / plain - 1)
        rows.append([method.partition("+")[0], seed, f"{plain:.4f}", f"{eight:.4f}", f"{eight / plain - 1:+.2%}"])
    print("\n".join(results.table(["method", "seed", "bfloat16", "int8", "change"], rows)))
    means = [statistics.mean(values) for values in changes.values()]
    half = stats.t.ppf(0.975, len(means) - 1) * statistics.stdev(means) / len(means) ** 0.5
    print(f"\nmean change {statistics.mean(means):+.2%} ± {half:.2%}, 95 % interval over {len(means)} seeds")


@torch.no_grad()
def write_outliers(size: float, folder: str) -> None:
    """The demo model with four pairs of channels in each MLP that are equal, ``size`` times as large as one of them
    was, and cancel in its output. Scales of channels take outliers into the weight, but these have ordinary weights."""
    model, tokenizer = rw.load_model("demo", dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        gate, up, down = (getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
        for linear in (gate, up, down):
            linear.weight.data = linear.weight.clone()
        for pair in torch.randperm(len(up.weight) // 2, generator=generator)[:4].tolist():
            first, second = 2 * pair, 2 * pair + 1
            gate.weight[second] = gate.weight[first]
            up.weight[first] *= size
            up.weight[second] = up.weight[first]
            column = torch.randn(len(down.weight), generator=generator) * down.weight.float().std()
            down.weight[:, first] = column.to(down.weight.dtype)
            down.weight[:, second] = -down.weight[:, first]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def print_head(name: str, data: str, tokens: int = 256) -> None:
    """Errors of the gradient dL/dh of the last hidden states, beside that of float32."""
    model, tokenizer = rw.load_model(name, dtype="bfloat16")
    assert tokenizer is not None
    rows = encode_rows(read_rows(data, split="train"), name="train", tokenizer=tokenizer, max_length=256).dataset
    ids = torch.tensor(list(itertools.chain.from_iterable(rows[:64]["input_ids"]))[: tokens + 1])
    h = model.base_model(input_ids=ids[None, :-1]).last_hidden_state[0]
    W = model.get_output_embeddings().weight
    scales = eight_bit.Scales.of(W, eight_bit.channel_scales(h.abs().amax(0).float(), W.abs().amax(0).float()))

    def gradient(z: Tensor) -> Tensor:
        dz = z.float().softmax(-1)
        dz[range(tokens), ids[1:]] -= 1
        return dz

    dz = gradient(torch.cat([h.float() @ part.float().T for part in W.split(8192)], dim=1))
    exact = sum(piece @ part.float() for piece, part in zip(dz.split(8192, dim=1), W.split(8192)))
    for what, found in (
        ("logits in bfloat16", gradient(h @ W.T).bfloat16() @ W),
        ("logits in 8 bits", gradient(eight_bit.product(h, W, scales)).bfloat16() @ W),
        ("gradient of logits in 8 bits", eight_bit.input_grad(dz.bfloat16(), W, scales)),
        ("as training computes both", trained(h, W, ids[1:], eight_bit.EightBit(scales.channel))),
    ):
        one, mean = ((a - b).norm() / b.norm() for a, b in ((found, exact), (found.float().mean(0), exact.mean(0))))
        print(f"{what}: dL/dh errs by {one:.1%}, its mean over tokens by {mean:.1%}")


@torch.enable_grad()
def trained(h: Tensor, W: Tensor, targets: Tensor, scales: eight_bit.EightBit) -> Tensor:
    h = h.detach().requires_grad_()
    (grad,) = torch.autograd.grad(linear_cross_entropy(h, W.detach(), targets, eight_bit=scales).loss, h)
    return grad


def measure(folder: str, method: str, given: argparse.Namespace) -> dict[str, list[float]]:
    dtype = getattr(torch, given.dtype)
    calls: dict[str, Any] = {"floor": timing.Floor(steps.dense_shapes(folder), given.batch * given.length, dtype=dtype)}
    for products in PRODUCTS:
        model = contenders.adapted(folder, method, 0.0, dtype)
        model.train()
        rw.optimize_for_training(model, products=products)
        calls[products] = contenders.Step(model, steps.batch_of(model, given))
    if not given.no_peft:
        model = contenders.peft(folder, method, 0.0, dtype)
        calls["peft"] = contenders.Step(model, steps.batch_of(model, given))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(given.rounds + 1):
        # The first round has calibrated the scales.
        if number == 1 and given.batch * given.length <= MOST_ROUNDED_ONCE:
            keep_rounded(calls["int8"].model)
        for name, call in calls.items():
            took = _seconds(call)
            if number:
                seconds[name].append(took)
    return seconds


def _seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    took = time.thread_time() - start
    if isinstance(call, contenders.Step):
        call.forget()
    return took


if __name__ == "__main__":
    main()
