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
    "repository",
]
# Dashes of options stay two, and a word in single backticks of a docstring is code.
smartquotes = False
default_role = "code"
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rankwise"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = ["versions.js"]
templates_path = ["_templates"]
# Furo's own, with the selector of versions below the search.
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "versions.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
# A copied command has no prompt in front.
copybutton_prompt_text = "$ "
