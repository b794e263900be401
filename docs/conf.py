"""Sphinx configuration: the pages are Markdown (myst-parser)."""

project = "rankwise"
copyright = "the rankwise authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Fine-tune a language model with low-rank adapters, wisely.",
    "page_width": "1120px",
    "body_max_width": "none",
}
autodoc_typehints = "description"
# Links into the tree (../CONTRIBUTING.md and the like) are for readers of the repository.
suppress_warnings = ["myst.xref_missing"]
html_static_path = ["_static"]
html_css_files = ["pages.css"]
