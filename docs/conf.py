"""The site. Build it with `sphinx-build -W -n docs site`."""

import re
from importlib.metadata import version as installed

project = "sharpness"
copyright = "the sharpness developers"
version = release = installed("sharpness")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinxcontrib.programoutput",
]
exclude_patterns = ["README.md"]
default_role = "code"

html_theme = "pydata_sphinx_theme"
html_title = "sharpness"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {"show_toc_level": 2, "header_links_before_dropdown": 7}
html_sidebars = {
    page: [] for page in ("index", "getting_started", "reproductions", "coming_from")
}

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "none"
napoleon_use_rtype = False
napoleon_use_ivar = True
# Types of other packages would need their inventories, which only a network has.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|scipy|pathlib|collections|matplotlib|pandas)\..*"),
    ("py:(class|obj)", r"sharpness\..*\._.*"),
]


_COLON = "\uf8ff"


def to_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are Markdown where it matters: formulas, and bars that are no markup."""
    text = "\n".join(lines)
    text = re.sub(r"^( *)\$\$(.*?)\$\$", _displayed, text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<![`\w$])\$([^$\n]+)\$", r":math:`\1`", text)
    parts = re.split(r"(:math:`[^`]*`|`[^`]*`|\.\. math::.*?\n\n)", text, flags=re.DOTALL)
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")
    if what == "property":  # else napoleon takes what stands before a colon for a type
        lines[:] = [line.replace(": ", _COLON) for line in lines]


def colons_again(app, what, name, obj, options, lines):
    """After napoleon."""
    lines[:] = [line.replace(_COLON, ": ") for line in lines]


def _displayed(found):
    indent, formula = found[1], " ".join(found[2].split())
    return f"\n{indent}.. math:: {formula}\n\n"


def setup(app):
    """Run around napoleon, which is at 500."""
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)
    app.connect("autodoc-process-docstring", colons_again, priority=600)
