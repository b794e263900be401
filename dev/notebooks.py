"""Run the notebooks of ``examples/`` as they are, and keep what they print.

python dev/notebooks.py first_run own_loop    these; without a name all that run on a CPU
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
# The other one is for a service with a GPU.
NOTEBOOKS = [path for path in sorted(EXAMPLES.glob("*.ipynb")) if path.stem != "free_gpu"]


def executed(path: Path, folder: Path) -> Any:
    """The notebook, each cell run in ``folder`` by a kernel of its own; without what goes to stderr."""
    import nbclient
    import nbformat

    made = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        made, timeout=7200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    made.metadata["language_info"] = {"name": "python"}
    for cell in made.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return made


if __name__ == "__main__":
    import nbformat

    for notebook in NOTEBOOKS:
        if notebook.stem in (sys.argv[1:] or [path.stem for path in NOTEBOOKS]):
            with tempfile.TemporaryDirectory() as place:
                nbformat.write(executed(notebook, Path(place)), notebook)
