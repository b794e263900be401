"""Make the pages in benchmarks/results again from the runs in benchmarks/results, without measuring anything.

    python benchmarks/pages.py

A benchmark makes the page of its own subject; this is for a changed layout, or for runs that came from other machines.
A subject without runs has no page.
"""

from __future__ import annotations

from collections.abc import Callable

import default_rates
import end_to_end
import evidence
import four_bits
import generation
import memory_plan
import mixtures
import once
import quantized_load
import results
import scaling
import steps
import tried_families

from rankwise.records import write_text

SUBJECTS: dict[str, Callable[[list[results.Run]], list[str]]] = {
    "steps": steps.page,
    "end_to_end": end_to_end.page,
    "evidence": evidence.page,
    "memory": memory_plan.page,
    "mixtures": mixtures.page,
    "four_bits": four_bits.page,
    "quantized_load": quantized_load.page,
    "generation": generation.page,
    "once": once.page,
    "scaling": scaling.page,
    "families": tried_families.page,
    "default_rates": default_rates.page,
}
MEASURED = [name for name in SUBJECTS if results.runs_of(name, results.FOLDER)]


def text_of(subject: str) -> str:
    return "\n".join(SUBJECTS[subject](results.runs_of(subject, results.FOLDER))) + "\n"


if __name__ == "__main__":
    for name in MEASURED:
        write_text(results.FOLDER / f"{name}.md", text_of(name))
