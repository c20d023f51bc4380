"""The lecture, docs/lecture.ipynb: compiled as its readers do it, for it samples a lot."""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_lecture_runs(monkeypatch):
    """Without Jupyter; each cell that draws has its figure in the notebook."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    lecture = importlib.import_module("run_lecture")
    notebook = json.loads(lecture.NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    drawn = lecture.run(notebook)
    outputs = [len(cell.get("outputs", ())) for cell in notebook["cells"]]
    assert outputs == [len(pictures) for pictures in drawn], "run python docs/run_lecture.py"
    assert sum(outputs) >= 10
    assert lecture.NOTEBOOK.stat().st_size < 500_000
