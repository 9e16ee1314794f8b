"""The site of these pages, built by ``make docs``. The pages read the same on GitHub: links are those of files."""

from importlib import metadata
from typing import Any

from sphinx.ext.napoleon.docstring import GoogleDocstring

project = "lightning-quant"
copyright = "the authors of lightning-quant"
release = metadata.version("lightning-quant")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lightning-quant {release}"
html_copy_source = False
html_show_sphinx = False

# links to headings, by the names that GitHub gives them
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# Sphinx's own handler takes a property's "None: there was none." for the type None: ours is below
napoleon_google_docstring = False
napoleon_numpy_docstring = False
# the fields of a dataclass are its parameters
napoleon_custom_sections = [("Attributes", "params_style")]

# names of other packages have no page here, and their inventories would need a network; names of ours have to be found
nitpick_ignore_regex = [("py:.*", r"(?!lightning_quant).*")]


def _google(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    kind = "method" if what in ("property", "attribute", "data") else what
    lines[:] = GoogleDocstring(lines, app.config, app, kind, name, value, options).lines()


def _readable(app: Any, what: str, name: str, value: Any, options: Any, signature: Any, returns: Any) -> Any:
    # Sphinx reads signatures as Python, which <factory> is not
    return (signature.replace("<factory>", "...") if signature else signature), returns


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _readable)
    app.connect("autodoc-process-docstring", _google)
