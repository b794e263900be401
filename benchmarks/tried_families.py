"""The page of model families that were tried, from the outcomes of the tests that try them.

    make families                                           # runs the tests, then this
    python benchmarks/tried_families.py .venv/families.xml  # the tests' outcomes, as pytest's --junitxml writes them

Writes benchmarks/results/families_cpu.json, and families.md beside it anew.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import results

from rankwise.errors import RunError
from rankwise.export.proof import server_python

# A check, the test that makes it for each family, and what it says when it passes.
CHECKS = {
    "trained": (
        "test_a_fast_step_is_the_plain_step",
        "rankwise's fast step with DoRA on all linear layers has the loss and the gradients of a plain step, with and "
        "without gradient checkpointing",
    ),
    "planned": (
        "test_a_trace_plans_it",
        "a trace (`plan`) counts the memory of a step on a CPU and on a GPU",
    ),
    "merged": (
        "test_a_merged_folder_is_the_adapted_model",
        "an adapter is saved and loaded again, and merged into a folder; transformers loads the folder, and the logits "
        "are those of the adapted model",
    ),
    "GGUF": (
        "test_an_adapter_s_pairs_added_to_the_base_s_tensors_are_the_merged_model",
        "`export --for llama.cpp` writes an adapter; its pairs, added to the tensors of the base's GGUF, give the "
        "adapted model",
    ),
    "llama.cpp": (
        "test_llama_cpp_answers_as_the_trained_model",
        "llama.cpp itself loads the exported adapter, and gives the log-probabilities of the adapted model",
    ),
}
OF_EVERY_FAMILY = ("trained", "planned", "merged")
CASE = re.compile(r"(\w+)\[(.+)\]")
# A case of the tests that is no family of its own.
SAME_FAMILY = {"tied": "llama"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outcomes", type=Path)
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args(arguments)
    run = {
        "command": "make families",
        "machine": results.machine(),
        "versions": {**results.versions(("rankwise", "torch", "transformers", "gguf")), "xllamacpp": server_version()},
        "outcomes": outcomes(given.outcomes),
    }
    results.publish(given.output, "families", run, page, "families_cpu")


def server_version() -> str | None:
    """The version of xllamacpp in the Python that the tests start as a server; None if there is none."""
    asked = "import importlib.metadata as m; print(m.version('xllamacpp'))"
    try:
        python = server_python("llama.cpp", None)
    except RunError:
        return None
    return subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def outcomes(path: Path) -> dict[str, dict[str, str]]:
    """{check: {family: why it was left out, empty where it passed}}. Raises ValueError where a test failed."""
    checks = {test: check for check, (test, _) in CHECKS.items()}
    found: dict[str, dict[str, str]] = {check: {} for check in CHECKS}
    for case in ElementTree.parse(path).iter("testcase"):
        named = CASE.fullmatch(case.get("name", ""))
        if named is None or named[1] not in checks:
            continue
        if case.find("failure") is not None or case.find("error") is not None:
            raise ValueError(f"{case.get('name')} failed; repair it before its outcome is published")
        skipped = case.find("skipped")
        reason = "" if skipped is None else " ".join(skipped.get("message", "").split())
        found[checks[named[1]]][SAME_FAMILY.get(named[2], named[2])] = reason
    return found


def page(runs: list[results.Run]) -> list[str]:
    run = runs[0]
    found: dict[str, dict[str, str]] = run["outcomes"]
    known = sorted({*found["GGUF"], *found["llama.cpp"]})
    others = sorted(found["trained"].keys() - set(known))
    whole = [family for family in others if not any(found[check][family] for check in OF_EVERY_FAMILY)]
    rest = [family for family in others if family not in whole]
    return [
        "# Model families that were tried",
        "",
        *results.where_from(runs),
        "*Tried* means: tests build a model of the family's class in transformers, with about two small layers and "
        "**random weights**, and run it on a CPU. So this page says that rankwise fits the family's code. It does not "
        "say how well a real model of the family learns: [few real models](../../docs/trained-models.md) were "
        "trained. Models that see images have "
        "[tests of their own](../../docs/adapters.md#models-that-also-see).",
        "",
        *results.table(
            ("check", "what it says", "families that passed"),
            [
                (check, meaning, str(sum(not reason for reason in found[check].values())))
                for check, (_, meaning) in CHECKS.items()
            ],
        ),
        "",
        "vLLM served only adapters of the demo model. SGLang and Ollama were not run "
        "([serving](../../docs/serving.md#proof)).",
        "",
        "## Families that the export knows by name",
        "",
        "An empty cell was not tried.",
        "",
        *results.table(("family", *CHECKS), [_row(family, found) for family in known]),
        "",
        f"## {len(whole)} other families that were trained, planned and merged",
        "",
        ", ".join(f"`{family}`" for family in whole) + ".",
        "",
        "## Families of which a check was left out",
        "",
        "*not made small*: the test could not build a small model of the family, so nothing was tried.",
        "",
        *(f"- {why}: {', '.join(names)}" for why, names in _by_reason(rest, found).items()),
    ]


def _row(family: str, found: dict[str, dict[str, str]]) -> tuple[str, ...]:
    return (f"`{family}`", *_cells(family, found, tuple(CHECKS)))


def _cells(family: str, found: dict[str, dict[str, str]], checks: Sequence[str]) -> list[str]:
    return ["yes" if found[check].get(family) == "" else "" for check in checks]


def _by_reason(families: Sequence[str], found: dict[str, Any]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for family in families:
        reasons = dict.fromkeys(
            found[check][family].partition(":")[0] for check in OF_EVERY_FAMILY if found[check][family]
        )
        names.setdefault(", ".join(reasons), []).append(f"`{family}`")
    return names


if __name__ == "__main__":
    main()
