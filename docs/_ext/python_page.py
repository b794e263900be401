"""Write ``python.md`` from the signatures and docstrings of the public names; Sphinx adds them whole.

python docs/_ext/python_page.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

HEAD = """# Python

`import rankwise as rw` gives these functions and classes. They change a transformers or plain PyTorch model in place.
The model keeps its class, so `Trainer`, `SFTTrainer`, `generate` and `accelerate` work on it unchanged. If PEFT has a
name for something, rankwise uses this name with the same meaning. [From PEFT and TRL](tutorials/from-peft.md) shows
them at work, [adapters](adapters.md) explains them, and `help(rw.add_adapter)` gives arguments, shapes and errors.
Every error is a `rankwise.errors.RankwiseError` with a [code](errors.md).
"""
GROUPS = {
    "Models": "load_model quantize Nf4Config Fp4Config Linear4bit",
    "Adapters": "LoraConfig add_adapter adapter_parameters adapter_config set_adapter adapter_disabled disable_adapter "
    "enable_adapter remove_adapter",
    "Saving, merging, exporting": "save_adapter load_adapter merge_adapter unmerge_adapter combine_adapters "
    "export_adapter",
    "Speed": "optimize_for_training accelerate_peft",
}
LONGEST = 4


def page() -> str:
    """The page as plain Markdown: a line for each name."""
    return "\n".join([HEAD, *(_table(title, names.split()) for title, names in GROUPS.items())])


def _table(title: str, names: list[str]) -> str:
    import rankwise

    lines = [f"## {title}\n", "| name | what it does |", "|---|---|"]
    for name in names:
        member = getattr(rankwise, name)
        said = " ".join(str(inspect.getdoc(member)).split("\n\n")[0].split()).partition(" Raises ")[0]
        lines.append(f"| `{name}({_arguments(member)})` | {said.replace('``', '`')} |")
    return "\n".join(lines) + "\n"


def _arguments(member: Any) -> str:
    parameters = list(inspect.signature(member).parameters.values())
    words = [one.name if one.default is one.empty else f"{one.name}={one.default!r}" for one in parameters]
    return ", ".join([*words[:LONGEST], "..."] if len(words) > LONGEST else words)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this: the site has a page with the whole docstrings too."""
    names = [name for group in GROUPS.values() for name in group.split()]
    directives = [f".. auto{'class' if name[0].isupper() else 'function'}:: rankwise.{name}" for name in names]
    text = "# Python, in full\n\n```{eval-rst}\n" + "\n".join([*directives, ".. automodule:: rankwise.ops.four_bit"])
    app.connect("builder-inited", lambda app: (Path(app.srcdir) / "python-in-full.md").write_text(text + "\n```\n"))
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    (Path(__file__).parents[1] / "python.md").write_text(page())
