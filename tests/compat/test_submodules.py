"""Canaries of what the source imports from submodules of transformers, outside of ``compat``: public names, which may
still move. Its top-level names are its interface, and need none.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import rankwise

SOURCE = Path(rankwise.__file__).parent
# {what is imported: the leading parameters of a function or class that is called by place, and names that are given}.
IMPORTED = {
    "transformers.cache_utils.DynamicCache": "config",
    "transformers.cache_utils.DynamicLayer": "",
    "transformers.core_model_loading.ConversionOps": "",
    "transformers.core_model_loading.WeightConverter": "source_patterns target_patterns operations",
    "transformers.core_model_loading.WeightTransform": "",
    "transformers.generation.streamers.BaseStreamer": "",
    "transformers.initialization.no_init_weights": "",
    "transformers.integrations.sdpa_attention.repeat_kv": "hidden_states n_rep",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": (
        "module query key value attention_mask dropout scaling is_causal"
    ),
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS": "",
    "transformers.masking_utils.AttentionMaskInterface": "",
    "transformers.modeling_layers.GradientCheckpointingLayer": "",
    "transformers.models.auto.configuration_auto.CONFIG_MAPPING": "",
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING": "",
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": "",
    "transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "",
    "transformers.pytorch_utils.Conv1D": "nf nx",
    "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING": "",
    "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING": "",
    "transformers.quantizers.auto.register_quantization_config": "method",
    "transformers.quantizers.auto.register_quantizer": "name",
    "transformers.quantizers.base.HfQuantizer": "quantization_config",
    "transformers.utils.chat_template_utils.render_jinja_template": "conversations",
    "transformers.utils.generic.ModelOutput": "",
    "transformers.utils.logging": "",
    "transformers.utils.quantization_config.QuantizationConfigMixin": "",
}


def imported(text: str) -> set[str]:
    """The names that a file imports from submodules of transformers, and such submodules."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("transformers.")}
    return found


def test_the_table_names_every_import() -> None:
    files = [file for file in SOURCE.rglob("*.py") if SOURCE / "compat" not in file.parents]
    assert set().union(*(imported(file.read_text(encoding="utf-8")) for file in files)) == set(IMPORTED)


def test_an_import_is_found_at_any_depth() -> None:
    text = "def f():\n    from transformers.utils import hub\n    import transformers.trainer\n"
    assert imported(text) == {"transformers.utils.hub", "transformers.trainer"}
    assert not imported("from transformers import PreTrainedModel\nimport transformers")


@pytest.mark.parametrize("name", IMPORTED)
def test_it_is_there_with_these_parameters(name: str) -> None:
    module, _, leaf = name.rpartition(".")
    found = getattr(importlib.import_module(module), leaf)
    wanted = IMPORTED[name].split()
    if wanted:
        names = list(inspect.signature(found).parameters)
        assert names[: len(wanted)] == wanted if len(wanted) > 1 else wanted[0] in names


def test_mappings_of_auto_classes_are_asked_by_kinds_of_configs() -> None:
    from transformers.models.auto import configuration_auto, modeling_auto

    kind = configuration_auto.CONFIG_MAPPING["llama"]
    assert kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    assert kind not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    assert "no such family" not in configuration_auto.CONFIG_MAPPING


def test_render_jinja_template_gives_texts_and_spans() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    given = [[{"role": "assistant", "content": "yes"}]]
    found = render_jinja_template(given, chat_template=template, return_assistant_tokens_mask=True)
    assert found == (["yes"], [[(0, 3)]])


def test_repeat_kv_repeats_heads_in_place() -> None:
    from transformers.integrations.sdpa_attention import repeat_kv

    heads = torch.arange(2.0).view(1, 2, 1, 1)
    assert repeat_kv(heads, 2).flatten().tolist() == [0, 0, 1, 1]
