"""The site of these pages, built by ``make docs``. The pages read the same on GitHub: links are those of files."""

from importlib import metadata

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

# a dataclass has its fields in "Attributes", and nowhere else
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"

# names of other packages have no page here, and their inventories would need a network; names of ours have to be found
nitpick_ignore_regex = [("py:.*", r"(?!lightning_quant).*")]
