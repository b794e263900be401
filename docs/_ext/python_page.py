"""Write ``python.md`` from the signatures and docstrings of the public names; Sphinx adds them whole.

python docs/_ext/python_page.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_type_hints

HEAD = """# Python

`import rankwise as rw` does what the commands do, and gives their parts to a program of your own. [From PEFT and
TRL](tutorials/from-peft.md) and [the notebooks](../examples) show it at work; `help(rw.train)` says more. Every error
is a `rankwise.errors.RankwiseError` with a [code](errors.md).

## Whole runs

Keywords are the commands' options: `--max-steps 8` is `max_steps=8`. Data may be a `datasets.Dataset` or a list of
dicts.

```python
import rankwise as rw

rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(6)]
run = rw.train(model="demo", data=rows[8:], eval_data=rows[:8], output="runs/first", max_steps=8, max_length=64)
print(run.loss, run.generate("3+4="))

options = {"max_length": 64, "max_steps": 4, "learning_rates": 1e-3, "seeds": 1}
comparison = rw.compare(model="demo", data=rows, methods="lora,qlora,dora,qdora", output="comparison", **options)
print(comparison.best, comparison.verdicts)
```

Results print themselves, in a notebook with the curve or the table. A run has `adapter` (its folder), `loss`,
`metrics`, `frame()`, `summary`, `generate(prompt)`, `compare(prompt)`, and `model` and `tokenizer`, loaded when asked
for. A plan has `rows` and `settings` (for `rw.train`), a comparison `best`, `adapter`, `verdicts` and `document`, an
evaluation `metrics`.

`train` and `evaluate` also take a model in memory, with `tokenizer=`. `train` adapts that object in place. If the run
stops, by an error or by Ctrl-C in a cell, the object loses the adapter, and the same call with `resume=True` goes on.

`train` calls `on_step`, `on_evaluation` and `on_save`. Numbers that `on_evaluation` returns, by name, are logged.
`raise StopIteration` ends the run as early stopping does; another exception stops it with its checkpoint.

## Parts

`rw.batches` gives a loop of your own the rows of each step as a run sees them. The other functions change a
transformers or plain PyTorch model in place. The model keeps its class, so `Trainer`, `SFTTrainer`, `generate` and
`accelerate` work on it. Names and meanings are PEFT's where PEFT has them ([adapters](adapters.md)).
"""
GROUPS = {
    "Functions for runs": "train plan compare evaluate batches",
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


def fields_of(config: Any) -> str:
    """The fields of ``LoraConfig`` that are options, each with its help, as a list of definitions."""
    hints = get_type_hints(config, include_extras=True)
    parts = [(name, part) for name, hint in hints.items() for part in getattr(hint, "__metadata__", ())]
    found = [(name, part.description) for name, part in parts if getattr(part, "description", None)]
    return "\n".join(f"   ``{name}``\n      {help}\n" for name, help in found)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this: the site has a page with the whole docstrings too."""
    from rankwise import LoraConfig

    names = [name for group in GROUPS.values() for name in group.split()]
    directives = [f".. auto{'class' if name[0].isupper() else 'function'}:: rankwise.{name}" for name in names]
    at = names.index("LoraConfig")
    directives[at] += f"\n\n{fields_of(LoraConfig)}"
    text = "# Python, in full\n\n```{eval-rst}\n" + "\n".join([*directives, ".. automodule:: rankwise.ops.four_bit"])
    app.connect(
        "builder-inited",
        lambda app: (Path(app.srcdir) / "python-in-full.md").write_text(text + "\n```\n", encoding="utf-8"),
    )
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    (Path(__file__).parents[1] / "python.md").write_text(page(), encoding="utf-8")
