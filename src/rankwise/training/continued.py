"""Training that continues an existing adapter (``--adapter``), as in SFT and then DPO."""

from __future__ import annotations

from torch import nn

from rankwise.adapters.checkpoint import load_adapter, read_folder
from rankwise.adapters.inject import keep_reference
from rankwise.config import DORA, TrainSettings
from rankwise.constants import TEMPLATE_FILE
from rankwise.errors import ConfigError
from rankwise.lora_config import ADAPTER
from rankwise.options import flag
from rankwise.records import record_of


def with_adapters_options(given: TrainSettings) -> TrainSettings:
    """The settings with the options of the adapter that ``--adapter`` names, and the chat template of its run where one
    was given; unchanged without ``--adapter``.

    Raises AdapterError (RW409, RW410) for an adapter that cannot be read, ConfigError: RW764 for options that differ
    from the adapter's, or for a method that does not train adapters of its kind, RW112 for new tokens with shards.
    """
    if given.adapter is None:
        return given
    config, _ = read_folder(given.adapter)
    kind, methods = ("DoRA", DORA) if config.use_dora else ("LoRA", ("lora", "qlora"))
    if given.method not in methods:
        raise ConfigError(
            "RW764",
            f"--adapter {given.adapter} is {kind}, which --method {given.method} does not train; give "
            f"{' or '.join(methods)}.",
        )
    if given.strategy == "fsdp" and config.token_rows:
        raise ConfigError(
            "RW112",
            f"--adapter {given.adapter} has new tokens, which need whole weights, and --strategy fsdp does not read "
            "these; take ddp.",
        )
    # The adapter's file does not hold the dtype in which it trained.
    own = {name: getattr(config, name) for name in ADAPTER if name != "adapter_dtype"}
    defaults = given.defaults()
    odd = [
        flag(name) for name, value in own.items() if _plain(getattr(given, name)) not in (_plain(value), defaults[name])
    ]
    if odd:
        raise ConfigError(
            "RW764", f"{', '.join(odd)}: --adapter {given.adapter} has its own value; leave the option out."
        )
    record = record_of(given.adapter)
    if given.chat_template is None and record is not None and record.settings.get("chat_template"):
        own["chat_template"] = given.adapter / TEMPLATE_FILE
    return given.model_copy(update=own)


def continue_adapter(model: nn.Module, given: TrainSettings, base_sha256: str) -> int:
    """Load the adapter to continue, and a frozen copy where the objective needs it as the reference. Returns the number
    of trained parameters.

    Raises ConfigError (RW764) for an adapter trained on another base, AdapterError for one that does not fit.
    """
    assert given.adapter is not None
    if (record := record_of(given.adapter)) is not None:
        theirs = record.base_model.get("sha256")
        if theirs not in (None, base_sha256):
            raise ConfigError(
                "RW764",
                f"--adapter {given.adapter} was trained on a different base than --model {given.model} (their sha256 "
                "differ); give the model that its run.json names.",
            )
    report = load_adapter(model, given.adapter, adapter_dtype=given.adapter_dtype)
    if given.objective in ("dpo", "kto") or given.beta:
        keep_reference(model)
    return report.trainable_parameters


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
