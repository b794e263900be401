"""The end of a run: choose the step to keep, write the final weights, check that they reload, plot."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.acceleration import restore
from rankwise.adapters import adapter_config, has_adapter, report
from rankwise.adapters.inject import guest_of
from rankwise.adapters.peft_config import CONFIG_FILE
from rankwise.compat.torch import is_unit
from rankwise.disk import flush, flush_tree, follow_umask, refuse_links
from rankwise.errors import warn
from rankwise.records import RunRecord, read_metrics, write_text
from rankwise.reports.model_card import model_card
from rankwise.reports.plots import loss_svg, search_svg
from rankwise.training.checkpoints import FOLDER, Checkpoint, check_checkpoint, temporary_folder
from rankwise.training.preflight import check_file, check_reload
from rankwise.training.weights import load_weights, save_weights

PLOT_FILE = "loss.svg"
SEARCH_FILE = "rates.svg"
CARD_FILE = "README.md"
# A rise of the training loss by this factor is more than the difference between batches.
FAR_ABOVE = 1.5


@dataclasses.dataclass(frozen=True)
class KeptStep:
    """The step whose weights the run keeps."""

    step: int
    because: str
    eval_loss: float | None


def choose_kept(losses: Mapping[int, float], last_step: int, best_step: int | None, *, of_rewards: bool) -> KeptStep:
    """The step with the best evaluation loss where there is one, else the last. ``losses``: {step: evaluation loss}.

    ``of_rewards``: the losses are negative mean rewards, and are described as rewards.
    """
    if best_step is None or best_step not in losses:
        why = "no evaluation data" if not losses else "no evaluation gave a finite loss"
        return KeptStep(last_step, f"the last step ({why})", losses.get(last_step))
    counted = sum(1 for step in losses if step > 0)
    best = "highest reward" if of_rewards else "lowest loss"
    return KeptStep(best_step, f"{best} of {counted} evaluation{'' if counted == 1 else 's'}", losses[best_step])


def warn_if_worse(initial: float | None, kept: KeptStep, *, of_rewards: bool) -> None:
    """Warn (RW526) where no step was better than the model before training."""
    if initial is None or kept.eval_loss is None or kept.eval_loss < initial:
        return
    if of_rewards:
        what = f"reward never rose above that before training ({-initial:.4f}; best {-kept.eval_loss:.4f})"
    else:
        what = f"loss never fell below that before training ({initial:.4f}; best {kept.eval_loss:.4f})"
    warn(
        "RW526",
        f"the evaluation {what}; try a lower --learning-rate, or check that the evaluation data is of the same kind.",
    )


def warn_of_one_label(measured: Mapping[str, float | None]) -> None:
    """Warn (RW262) where a model of labels gives all evaluation rows the same one."""
    if measured.get("labels_answered") == 1:
        warn(
            "RW262",
            "the model answers every evaluation row with the same label; train longer or at another --learning-rate, "
            "and look at the number of rows of each label with `rankwise preview --objective classify`.",
        )


def warn_if_risen(losses: Sequence[float]) -> None:
    """Warn (RW526) where the logged training losses end far above the first, for a run without evaluations.

    Single batches differ, so all of the last quarter must lie above.
    """
    last = losses[-max(3, len(losses) // 4) :]
    if len(losses) > len(last) and min(last) > FAR_ABOVE * losses[0] > 0:
        warn(
            "RW526",
            f"the training loss ended far above its start ({losses[0]:.4f}; {min(last):.4f} or more in the last "
            f"{len(last)} logged steps); try a lower --learning-rate, and give --eval-data to keep the best step.",
        )


def restore_kept(model: nn.Module, output: Path, kept: KeptStep, last_step: int) -> None:
    """Load the kept step's weights into the model, if training continued after that step."""
    if kept.step == last_step:
        return
    checkpoint = Checkpoint(kept.step, output / FOLDER / f"step-{kept.step}")
    check_checkpoint(checkpoint)
    load_weights(model, checkpoint.path)


def write_final(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    announce: Callable[[list[str]], None],
    gathered: dict[str, Tensor] | None = None,
) -> None:
    """Write the final weights and the tokenizer into the run folder; ``gathered`` as for ``save_weights``.

    Each file appears whole or not at all, and only after ``announce`` was called with the names of all files.
    """
    model.config.use_cache = True
    with temporary_folder(output, "final") as folder:
        save_weights(model, folder, gathered)
        tokenizer.save_pretrained(folder)
        follow_umask(folder)
        flush_tree(folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        announce(names)
        refuse_links(output, {name.split("/")[0] for name in names if "/" in name})
        for name in names:
            (output / name).parent.mkdir(exist_ok=True)
            os.replace(folder / name, output / name)
        flush(output)


def prove_reload(model: nn.Module, output: Path, probe: dict[str, Tensor]) -> None:
    """Load a written adapter into its base again and compare the logits. Raises RunError (RW524).

    Two cases compare the file with the trained tensors instead: a sharded base, since the row norms of a new adapter
    would need the whole base, and PiSSA, whose adapter belongs on weights that are no longer in memory.
    """
    if not has_adapter(model):
        return
    if is_unit(model) or adapter_config(model).init.kind == "pissa":
        check_file(model, output)
    else:
        # A reloaded adapter is not accelerated. Without acceleration both sides add their terms in the same order.
        restore(model)
        check_reload(model, output, probe)


def write_plot(output: Path, record: RunRecord) -> None:
    """Write ``loss.svg`` from ``metrics.jsonl``, and ``rates.svg`` where the learning rate was searched for."""
    title = f"{record.settings.get('model', '')}, {record.method}"
    svg = loss_svg(list(read_metrics(output)), title=title, kept_step=record.kept_step, objective=record.objective)
    write_text(output / PLOT_FILE, svg)
    if record.rate_search is not None:
        write_text(output / SEARCH_FILE, search_svg(record.rate_search, title))


def write_card(model: nn.Module, output: Path, record: RunRecord) -> None:
    """Write the model card ``README.md``. Methods of other distributions get none."""
    if guest_of(model) is not None:
        return
    adapted = has_adapter(model)
    config = json.loads((output / CONFIG_FILE).read_text(encoding="utf-8")) if adapted else None
    write_text(output / CARD_FILE, model_card(record, config, report(model) if adapted else None))
