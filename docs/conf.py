"""Sphinx configuration of the documentation site; `make docs` builds it, warnings are errors."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import gallery  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

project = "dit_lens"
author = "the dit_lens maintainers"
release = version = metadata.version("dit_lens")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.py"]
html_static_path = ["_static"]
html_theme = "furo"
html_title = "dit_lens"
html_theme_options = {"source_directory": "docs/"}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# notebooks are executed by `make notebooks`, and their output is committed
nb_execution_mode = "off"

autodoc_typehints = "none"  # shapes stand in the signatures
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_mock_imports: list[str] = []
napoleon_google_docstring = True
napoleon_numpy_docstring = False
viewcode_follow_imported_members = False  # or sources link back to names that no page has
copybutton_prompt_text = ">>> "
default_role = "literal"  # single backticks are code
suppress_warnings = [
    "ref.python",  # a parameter and an attribute of the same name
    "misc.highlighting_failure",
    # links from docstrings and from pages that also stand in the repository, checked by a test
    "myst.xref_missing",
]


def _prepare(app: object) -> None:
    """Copy notebooks, since Sphinx reads below its own folder only, and draw missing pictures."""
    target = HERE / "tutorials"
    for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, target / notebook.name)
    gallery.draw_missing()


def _plain_docstring(
    app: object, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Read indented paragraphs as code, |word| as it stands; add pictures (`docs/gallery.py`)."""
    text = re.sub(r"\|(\w+)\|", r"\\|\1\\|", "\n".join(lines))
    if what == "module":
        text = re.sub(r"(?<=\n)\n((?: {4}.*\n?)+)", r"\n::\n\n\1", text)
    lines[:] = text.split("\n")
    if what in ("function", "class") and name.startswith(("dit_lens.viz.", "dit_lens.lab.")):
        for picture in (HERE / "_static/viz").glob(f"{name.rpartition('.')[2]}.*"):
            lines += ["", f".. image:: /_static/viz/{picture.name}", f"   :alt: {name}, drawn", ""]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", _prepare)
    app.connect("autodoc-process-docstring", _plain_docstring, priority=400)
