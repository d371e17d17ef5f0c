"""The documentation: `python -m sphinx -W -b html docs docs/_build/html`.

Sphinx, because the docstrings are NumPy-style reStructuredText with formulas, which it reads as they are; pages are
Markdown (MyST); the theme is furo.
"""

import nearfar

project = "nearfar"
author = "the nearfar developers"
version = release = nearfar.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"nearfar {release}"
html_theme_options = {"sidebar_hide_name": False}
