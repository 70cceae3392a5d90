"""How the documentation is built: `make docs`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's code, not an installed one

import eva_rl  # noqa: E402

project = "eva_rl"
author = "the authors of eva_rl"
release = version = eva_rl.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_show_copyright = False
html_title = "eva_rl"

myst_heading_anchors = 3

default_role = "code"  # docstrings write code in single backticks
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


def escape_stars(app, what, name, obj, options, lines):
    """Escape the star of a shape such as `(n, *action_shape)`, which docstrings write plain."""
    lines[:] = [re.sub(r"(?<=, )\*(?=\w+[,)])", r"\\*", line) for line in lines]


def link_files(app, page, source):
    """Offer Markdown files outside docs/, such as a table of results, as files, since they are no pages of the site."""
    source[0] = re.sub(r"\]\((\.\./(?:\.\./)?(?:[a-z_]+/[^)]*|[A-Z]+)\.md)\)", r"](path:\1)", source[0])


def setup(app):
    app.connect("autodoc-process-docstring", escape_stars)
    app.connect("source-read", link_files)
