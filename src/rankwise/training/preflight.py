"""Checks before the first step, at the first steps and at the end of a run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import safetensors.torch
import torch
from datasets import Dataset
from torch import Tensor, nn

from rankwise.adapters import adapter_config, adapter_parameters, has_adapter, load_adapter, remove_adapter
from rankwise.adapters.inject import guest_of
from rankwise.adapters.lora import KEY as TOKENS
from rankwise.adapters.saving import WEIGHTS_FILE, adapter_tensors
from rankwise.errors import DataError, RunError, some_of, warn
from rankwise.models.load import table_rows
from rankwise.training.checkpoints import check_space
from rankwise.training.foresight import longest_row
from rankwise.training.weights import checkpoint_bytes, trainable_tensors


def check_labels(*, tokens: int, trained_tokens: int, stop_rows: int, whole_texts: bool, source: str) -> None:
    """Check that there are trained tokens, and stop tokens among them.

    ``stop_rows``: number of rows with a stop token in the labels; ``whole_texts``: the rows are plain texts, which
    need no stop token. Raises RunError RW521 where no token is trained, DataError RW213 where no row has a
    stop token (of whole texts a warning).
    """
    if not trained_tokens:
        raise RunError(
            "RW521",
            f"none of the {tokens:,} label tokens in {source} is trained; raise --max-length so that answers are not "
            "cut off, or check with `rankwise preview` which tokens the template marks as the answer.",
        )
    if stop_rows:
        return
    text = (
        f"no label in {source} is a stop token, so the model would not learn to stop; raise --max-length if rows are "
        "cut, or use a chat template that trains the end of the turn."
    )
    if not whole_texts:
        raise DataError("RW213", text)
    warn("RW213", text)


def check_positions(model: nn.Module, datasets: Iterable[Dataset]) -> None:
    """Raise RunError (RW533) where an encoded row has more tokens than the model has learned positions."""
    rows = table_rows(model)
    if rows is None:
        return
    longest = max(map(longest_row, datasets))
    if longest > rows:
        raise RunError(
            "RW533",
            f"the longest row has {longest:,} tokens, and this {type(model).__name__} has learned positions for "
            f"{rows:,}; give --max-length {rows} or less.",
        )


def check_trainable(model: nn.Module, method: str) -> None:
    """Raise RunError (RW522) where no parameter trains, or the method needs an adapter and the model has none."""
    if method != "full" and not has_adapter(model) and guest_of(model) is None:
        raise RunError("RW522", f"--method {method} needs an adapter, and the model has none; call add_adapter first.")
    if not trainable_tensors(model):
        raise RunError("RW522", "no parameter of the model trains; check --target-modules.")


def check_disk(model: nn.Module, output: Path, checkpoints: int) -> None:
    """Raise RunError (RW513) where ``checkpoints`` checkpoints, one being written and the result do not fit on disk."""
    check_space(output, checkpoint_bytes(model) * (checkpoints + 2))


class GradientCheck:
    """Checks that each adapter tensor gets a finite, nonzero gradient as soon as its method implies one.

    This is the first step for B and m. For A it is the first step after B has changed; with warm-up, one step later,
    since the first learning rate is 0. The tensors of an expert to which no token was routed may wait.
    ``waiting``: the tensors that a resumed run has still to check; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        overflow_is_normal: bool = False,
        silence_is_normal: bool = False,
        waiting: Collection[str] | None = None,
    ) -> None:
        self.parameters = dict(adapter_parameters(model)) if has_adapter(model) else {}
        self.waiting = {key: value for key, value in self.parameters.items() if waiting is None or key in waiting}
        self.overflow_is_normal = overflow_is_normal
        # If so, steps in which no tensor has a gradient are ignored.
        self.silence_is_normal = silence_is_normal

    @property
    def done(self) -> bool:
        return not self.waiting

    def look(self, step: int) -> None:
        """Check the gradients of step ``step``, before the optimizer uses them.

        Raises RunError: RW530 for a gradient that is not finite, RW523 with the tensors that got no gradient.
        """
        if any(value.grad is not None and not value.grad.isfinite().all() for value in self.waiting.values()):
            if self.overflow_is_normal:
                return
            raise RunError("RW530", f"a gradient is not finite at step {step}; lower --learning-rate.")
        silent = [key for key, value in self.waiting.items() if value.grad is None or not value.grad.any()]
        if self.silence_is_normal and len(silent) == len(self.waiting):
            return
        wrong = [key for key in silent if not self._may_wait(key)]
        if wrong:
            raise RunError(
                "RW523",
                f"{len(wrong)} of {len(self.parameters)} adapter tensors received no gradient at step {step}: "
                f"{some_of(wrong)}; choose --target-modules that the model's forward uses.",
            )
        self.waiting = {key: self.waiting[key] for key in silent}

    def end(self, steps: int) -> None:
        """Warn (RW778) where the steps that ``silence_is_normal`` let pass were all of the run's."""
        if self.silence_is_normal and steps and 0 < len(self.waiting) == len(self.parameters):
            warn(
                "RW778",
                "no adapter tensor received a gradient in any step of the run, so the adapter is as it was before; "
                "give a reward that differs between the answers to one prompt, or easier prompts.",
            )

    def _may_wait(self, key: str) -> bool:
        # A batch may hold none of the new tokens, or no token whose column of A has changed.
        if ".experts." in key or key.endswith(TOKENS) or "lora_embedding_B" in key:
            return True
        for ours, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            partner = key.replace(ours, other) if ours in key else key.replace(other, ours)
            if partner != key:
                return partner in self.parameters and not self.parameters[partner].any()
        return False


def check_reload(model: nn.Module, folder: Path, probe: dict[str, Tensor]) -> None:
    """Load the adapter of ``folder`` into its base again, and compare its logits on ``probe`` with the trained one's.

    ``probe`` holds input_ids (1, L). The model keeps the reloaded adapter. Raises RunError (RW524).
    """
    before, dtype = probe_logits(model, probe), adapter_config(model).adapter_dtype
    remove_adapter(model)
    # In another dtype, the same numbers may give another sum.
    load_adapter(model, folder, adapter_dtype=dtype)
    after = probe_logits(model, probe)
    difference = (before - after).abs().max().item()
    # On a CPU the logits must be equal bit for bit; elsewhere the order of sums may vary.
    exact = before.device.type == "cpu"
    allowed = 0.0 if exact else 4 * torch.finfo(before.dtype).eps * before.abs().max().item()
    if not difference <= allowed:
        raise RunError(
            "RW524",
            f"the adapter in {folder} gives other logits after reloading (largest difference {difference:.3g}), so it "
            "is not what was trained; please report this model and these settings.",
        )


def check_file(model: nn.Module, folder: Path) -> None:
    """Check that the adapter's file in ``folder`` holds the trained tensors bit for bit. Raises RunError (RW524)."""
    stored = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    wrong = [name for name, value in adapter_tensors(model).items() if not torch.equal(stored[name], value)]
    if wrong:
        raise RunError(
            "RW524",
            f"the adapter in {folder} is not what was trained ({some_of(wrong)}); please report this model and these "
            "settings.",
        )


@torch.no_grad()
def probe_logits(model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
    """The logits (1, L, V) of the model in evaluation mode."""
    training = model.training
    model.eval()
    logits: Tensor = model(**probe, use_cache=False).logits
    model.train(training)
    return logits
