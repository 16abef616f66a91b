"""Settings of the documentation site: `make docs` builds it into build/docs."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import site_pages  # noqa: E402

project = "mdistiller"
author = "mdistiller contributors"
copyright = "mdistiller contributors, MIT license"
release = site_pages.version()

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # equations without a network
    "sphinx_copybutton",
]
exclude_patterns = ["requirements.txt", "images/*.md"]
myst_enable_extensions = ["amsmath", "dollarmath", "deflist"]
myst_heading_anchors = 4
# Shell and text blocks have no language in the Markdown files.
highlight_language = "none"

# Docstrings name parts of the code in single backticks, which link where the name has a page.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"mdistiller {release}"
html_static_path = ["static"]
html_logo = html_favicon = "static/logo.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


def setup(app):
    """Connects the generated pages, the links that leave docs/, and the equations of docstrings."""
    # Until the repository is public at its address, files outside docs/ are copied into the site.
    site_pages.connect(app, DOCS, None)
