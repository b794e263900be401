"""Sphinx configuration: the pages are Markdown (myst-parser)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "rankwise"
copyright = "the rankwise authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "command_line",
    "python_page",
]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rankwise"
autodoc_typehints = "description"
# Links into the tree (../CONTRIBUTING.md and the like) are for readers of the repository.
suppress_warnings = ["myst.xref_missing"]
html_static_path = ["_static"]
html_css_files = ["pages.css"]
# A copied command has no prompt in front.
copybutton_prompt_text = "$ "
