"""Runs docs/lecture.ipynb without Jupyter, and stores its figures in it.

    python docs/run_lecture.py

The cells are executed from top to bottom in one namespace, as a kernel does it.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent / "lecture.ipynb"


def run(notebook: dict[str, Any]) -> list[list[bytes]]:
    """Returns the figures that each cell of a notebook draws, as PNG. Raises what a cell raises."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    names: dict[str, Any] = {"__name__": "__main__"}
    drawn = []
    with matplotlib.rc_context():  # the notebook sets some
        for number, cell in enumerate(notebook["cells"]):
            drawn.append([])
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), names)
            for figure in map(plt.figure, plt.get_fignums()):
                file, small = io.BytesIO(), io.BytesIO()
                figure.savefig(file, format="png")
                Image.open(file).convert("RGB").quantize(64).save(small, "png", optimize=True)
                drawn[-1].append(small.getvalue())
            plt.close("all")
    return drawn


def store(notebook: dict[str, Any], drawn: list[list[bytes]]) -> None:
    """Puts the figures into the notebook as the outputs of its cells."""
    for cell, pictures in zip(notebook["cells"], drawn, strict=True):
        if cell["cell_type"] == "code":
            data = [base64.b64encode(picture).decode() + "\n" for picture in pictures]
            cell["outputs"] = [
                {"output_type": "display_data", "metadata": {}, "data": {"image/png": one}} for one in data
            ]


if __name__ == "__main__":
    content = json.loads(NOTEBOOK.read_text())
    store(content, run(content))
    NOTEBOOK.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
