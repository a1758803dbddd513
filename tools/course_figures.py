"""Copy the figures of docs/figures.md out of the lessons that draw them, into docs/figures.

    python tools/course_figures.py

A test fails where a copy is not what its lesson shows.
"""

import base64
from pathlib import Path

from build_notebooks import ROOT, read_notebook
from nbformat import NotebookNode
from site_pages import image_metadata

FOLDER = ROOT / "docs" / "figures"
FIGURES = {  # by lesson: how the alt text of its figure begins
    "05_kl_penalty": "Gold against the root of KL",
    "06_your_clicks": "Score, gold, KL and share finished",
    "07_clinic": "Which alarms each fault trips",
    "09_without_a_critic": "Gold against √KL",
    "10_beyond_one_gpu": "Histograms on a logarithmic axis",
}


def figure(nb: NotebookNode, begins: str) -> bytes:
    """The one picture of a notebook whose alt text begins so."""
    outputs = [output for cell in nb.cells for output in cell.get("outputs", [])]
    found = [o for o in outputs if image_metadata(o).get("alt", "").startswith(begins)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} figures have an alt text that begins {begins!r}; want one")
    return base64.b64decode(found[0].data["image/png"])


def copies() -> dict[Path, bytes]:
    """What each file of docs/figures must hold."""
    return {
        FOLDER / f"{stem}.png": figure(read_notebook(ROOT / "notebooks" / f"{stem}.ipynb"), begins)
        for stem, begins in FIGURES.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, picture in copies().items():
        path.write_bytes(picture)
        print(path.relative_to(ROOT))
