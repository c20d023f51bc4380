"""Draws the rooms of the project and what they import, read from the source: docs/architecture.svg.

    python docs/draw_architecture.py

Run it when files come or go; tests/test_docs.py compares the picture with the source.
"""

import ast
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
# Where a room is drawn: (left, right) in its row, the rows from the bottom up.
ROWS: list[dict[str, tuple[float, float]]] = [
    {"papers": (0.0, 9.2), "files": (9.8, 12.0)},
    {"data": (1.2, 6.0), "networks": (7.0, 12.0)},
    {"training": (0.0, 6.0), "pretrained": (7.0, 12.0)},
    {"evaluation": (3.6, 9.4)},
    {"model": (2.0, 10.0)},
    {"runs": (1.0, 11.0)},
    {"experiments": (0.0, 7.6), "demo": (8.2, 12.0)},
]
WHAT = {
    "papers": "diffusion/*.py: the papers, jax.numpy alone",
    "files": "diffusion/*.py: others",
    "data": "diffusion/data: images by index",
    "networks": "diffusion/networks: Flax modules",
    "training": "diffusion/training: the loop, checkpoints",
    "pretrained": "diffusion/pretrained: public weights",
    "evaluation": "diffusion/evaluation: samples to a report",
    "model": "diffusion/model: where the parts meet; reads configs",
    "runs": "diffusion/runs: what can be done with a run, one file per mode",
    "experiments": "experiments: data and its own questions",
    "demo": "diffusion/demo: the prompt page",
}
X = {("model", "training"): 2.8, ("training", "papers"): 0.6, ("evaluation", "papers"): 6.5}  # of arrows beside a row


def room_of(module: str) -> str | None:
    """Returns the room of a module of ours; None for others. A file directly in diffusion/ is a paper."""
    top, *rest = module.split(".")
    if top == "experiments":
        return top
    if top != "diffusion" or not rest:
        return None
    if (ROOT / "diffusion" / rest[0]).is_dir():
        return rest[0]
    return "files" if rest[0] in ("files", "extras", "compiler") else "papers"


def read_rooms() -> dict[str, dict[str, list[str]]]:
    """Returns {room: {"files": [...], "imports": [rooms]}} as the source has it."""
    rooms: dict[str, dict[str, set[str]]] = {}
    for path in sorted([*(ROOT / "diffusion").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if room is None or path == ROOT / "diffusion" / "__init__.py":
            continue
        found = rooms.setdefault(room, {"files": set(), "imports": set()})
        if path.stem != "__init__":
            inside = path.relative_to(ROOT).parts[2 if room not in ("papers", "files", "experiments") else 1 :]
            found["files"].add(path.stem if len(inside) == 1 else f"{inside[0]}/")
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            found["imports"] |= {other for name in names if (other := room_of(name)) not in (None, room)}
    return {room: {what: sorted(names) for what, names in found.items()} for room, found in sorted(rooms.items())}


def reached(arrows: dict[str, set[str]], room: str) -> set[str]:
    """Returns every room that arrows lead to from `room`."""
    return arrows[room].union(*(reached(arrows, other) for other in arrows[room]))


def needed(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the arrows that do not follow from others."""
    return [
        (room, other)
        for room, others in arrows.items()
        for other in sorted(others)
        if not any(other in reached(arrows, between) for between in others - {other})
    ]


def drawn_rooms() -> dict[str, Any]:
    """Returns the rooms that the picture was drawn of."""
    text = PICTURE.read_text()
    start = text.index("{", text.index("<dc:description>"))
    return json.loads(text[start : text.index("</dc:description>")])


def draw(path: Path, rooms: dict[str, dict[str, list[str]]]) -> None:
    """Draws `rooms` with the arrows that do not follow from others, and stores them in the picture.

    Raises:
      ValueError: a room that has no place in ROWS.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    # A fixed salt and no date: the same source gives the same file.
    plt.rcParams.update({"svg.hashsalt": "rooms", "svg.fonttype": "none", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(10, 9.2))
    axes.set(xlim=(-0.2, 12.2), ylim=(-0.1, 11))
    axes.axis("off")
    colours = plt.get_cmap("Pastel1").colors  # type: ignore[attr-defined]
    boxes, bottom = {}, 0.0
    for row, places in enumerate(ROWS):
        texts = {}
        for room, (left, right) in places.items():
            if room in rooms:
                texts[room] = textwrap.wrap("  ".join(rooms[room]["files"]), int(11.5 * (right - left)) - 3)
        height = 0.6 + 0.21 * max(len(lines) for lines in texts.values())
        for room, lines in texts.items():
            left, right = places[room]
            boxes[room] = (left, right, bottom, bottom + height)
            style = "round,pad=0,rounding_size=0.12"
            axes.add_patch(FancyBboxPatch((left, bottom), right - left, height, style, fc=colours[row], ec="0.4"))
            axes.text(left + 0.15, bottom + height - 0.15, WHAT[room], va="top", weight="bold", size=9.5)
            axes.text(left + 0.15, bottom + height - 0.45, "\n".join(lines), va="top", size=8.5, linespacing=1.35)
        bottom += height + 0.5
    if missing := rooms.keys() - boxes.keys():
        raise ValueError(f"give {', '.join(sorted(missing))} a place in ROWS and a line in WHAT")
    for room, other in needed({room: set(found["imports"]) for room, found in rooms.items()}):
        left, right, start, _ = boxes[room]
        other_left, other_right, _, end = boxes[other]
        low, high = max(left, other_left), min(right, other_right)
        x = X.get((room, other), (low + high) / 2)
        tail, head = (x, x) if low < high else ((right - 0.4, other_left + 0.4) if right < other_left else (left, high))
        if low >= high and right >= other_left:
            tail, head = left + 0.4, other_right - 0.4
        axes.annotate("", (head, end), (tail, start), arrowprops={"arrowstyle": "-|>", "color": "0.25", "lw": 1.4})
    axes.set_ylim(-0.1, bottom - 0.3)
    figure.subplots_adjust(0, 0, 1, 1)
    metadata = {"Date": None, "Description": json.dumps(rooms)} if path.suffix == ".svg" else {}
    figure.savefig(path, metadata=metadata, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE, read_rooms())
