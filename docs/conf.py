"""The course as a website: `make site` reads this, executes nothing and writes `build/site`.

Sphinx's source folder is the top folder, so that a link between two files leads to the same place
on the site, in JupyterLab and in a clone. Pages are those of `include_patterns`.
"""

import json
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from site_pages import as_page, home, rst_safe, unbuilt, unlinked  # noqa: E402

project = "RLHF from first principles"
author = "the authors of the course"
copyright = f"{author}, Apache-2.0"
root_doc = "docs/index"
cards = [f"rlhf_helpers/assets/{name}/README.md" for name in ("base", "sft", "reward")]
folders = ["notebooks/*.ipynb", "exercises/*.ipynb", "solutions/*.ipynb", "docs/*.md"]
include_patterns = [*folders, "docs/api/**", *cards]
exclude_patterns = [".*", "build", "runs", "*/runs", "**/src", "tests", "**/.*"]

extensions = ["myst_nb", "autoapi.extension", "sphinx.ext.napoleon", "sphinx_copybutton"]
extensions += ["sphinx-mathjax-offline"]  # formulas are drawn by a copy of MathJax on the site

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # they would come from another host, and no kernel answers them here
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

autoapi_dirs = [str(ROOT / "rlhf_helpers")]
autoapi_root = "docs/api"
autoapi_add_toctree_entry = False
autoapi_own_page_level = "module"
autoapi_options = ["members", "undoc-members"]
autoapi_python_class_content = "class"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True  # a field with an annotation is documented once, by it
suppress_warnings = ["autoapi.python_import_resolution"]  # names that the package makes in a loop
add_module_names = False
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]  # index.html, which leads to docs/index.html
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search stands in the sidebar
}

QUALIFIED = re.compile(
    r"\b(?:rlhf_helpers|torch|datasets|transformers|collections\.abc)\.(?:[a-z_]+\.)*"
)


def on_source(app, name, source):
    """Pages as the site shows them; what is downloaded stays as it is."""
    if name == root_doc:
        source[0] = home(source[0], (ROOT / "README.md").read_text(encoding="utf-8"))
    if str(app.env.doc2path(name)).endswith(".ipynb"):
        source[0] = json.dumps(as_page(json.loads(source[0]), unbuilt(ROOT)))
    else:
        source[0] = unlinked(source[0], unbuilt(ROOT))


def on_doctree(app, doctree):
    """Give each figure of a cell its own of the cell's alt texts; shorten names in signatures."""
    for signature in doctree.findall(addnodes.desc_signature):
        for text in list(signature.findall(nodes.Text)):
            text.parent.replace(text, nodes.Text(QUALIFIED.sub("", text)))
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") != "cell_code":
            continue
        images = list(cell.findall(nodes.image))
        alts = images[0]["alt"].split("\n") if images else []
        for image, alt in zip(images, alts, strict=True):
            image["alt"] = alt


def on_docstring(app, what, name, obj, options, lines):
    """Formulas keep their stars, bars and underscores."""
    lines[:] = rst_safe(lines)


def setup(app):
    """Hooks: ours on docstrings before napoleon's."""
    app.connect("source-read", on_source, priority=100)
    app.connect("doctree-read", on_doctree)
    app.connect("autodoc-process-docstring", on_docstring, priority=100)
