"""What each field of a config means: the comments of its config file, and the docstrings of its choices.

comments_of(config, "experiments/configs/digits.py")  # {"data.batch_size": "over all devices", ...}
"""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.model.config import Config, plain
from diffusion.model.fields import CHOICES, block_at, is_choice
from diffusion.training.workdir import flatten


class Block(NamedTuple):
    """Fields that a config file sets together.

    Attributes:
      place: of the block in the config, as "sampling.grid"; "" for the config itself.
      name: of the choice that it is, "" where it has none.
      comments: of each field, "" where there is none.
    """

    place: str
    name: str
    comments: dict[str, str]


def comments_of(config: Config, *files: Path) -> dict[str, str]:
    """Returns the comment of each field that has one, by the field's full name.

    A field has the comment of the block that is most like its own, in the first file that has such a block; a field of
    a choice, that of a block of the same name, or the words of the choice's docstring.

    Args:
      config: whose fields they are.
      *files: config files, that of the config before those that it is made of.
    """
    blocks = [block for path in files if path.is_file() for block in read_blocks(path.read_text())]
    found: dict[str, str] = {}
    fields = flatten(plain(config))
    for place in {field.rpartition(".")[0] for field in fields}:
        own = {field.rpartition(".")[2] for field in fields if field.rpartition(".")[0] == place}
        name = (block_at(config, place) or {}).get("name", "") if place else ""
        choice = CHOICES[place].get(name) if place and is_choice(config, place) else None
        there = [block for block in blocks if block.place == place]
        same = [block for block in there if not block.name or block.name == name] if choice else there
        nearest = sorted(same, key=lambda block: -len(own & block.comments.keys()) + len(block.comments.keys() - own))
        sources = [block.comments for block in nearest] + [docstring_of(choice)] + [block.comments for block in there]
        for field in own:
            comment = next((source[field] for source in sources if source.get(field)), "")
            found[f"{place}.{field}".lstrip(".")] = comment
    return {field: comment for field, comment in found.items() if comment}


def choices_of(config: Config) -> dict[str, list[str]]:
    """Returns what each field that names a choice can be, by its full name."""
    places = [place for place in CHOICES if block_at(config, place) is not None and is_choice(config, place)]
    return {f"{place}.name": list(CHOICES[place]) for place in places}


def docstring_of(choice: Any) -> dict[str, str]:
    """Returns what the docstring of a function says of its arguments, or of a module of its attributes."""
    text = inspect.getdoc(choice) or ""
    section = re.search(r"^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", text, flags=re.M | re.S)
    found = {}
    for names, words in re.findall(
        r"^  (\w[\w, ]*): (.*?)(?=^  \S|\Z)", section[1] if section else "", flags=re.M | re.S
    ):
        found |= dict.fromkeys(names.split(", "), " ".join(words.split()).rstrip("."))
    return found


def read_blocks(source: str) -> list[Block]:
    """Returns the blocks that a config file sets, from its source, in their order.

    They are `config.PLACE = ConfigDict(dict(...))`, the same of a dict with a name of its own,
    `config.PLACE.update(...)` and `config.PLACE.FIELD = value`.
    """
    comments = Comments(source)
    tree = ast.parse(source)
    named = {
        statement.targets[0].id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    found: list[Block] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (place := place_of(node.targets[0])):
            if inner := dict_of(node.value, named):
                found += blocks_of(place, inner, comments, named)
            else:
                before, _, field = place.rpartition(".")
                found.append(Block(before, "", {field: comments.at(node)}))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "update"
            and (place := place_of(node.func.value))
        ):
            found += blocks_of(place, node, comments, named)
    return found


def blocks_of(place: str, call: ast.Call, comments: "Comments", named: dict[str, ast.expr]) -> Iterator[Block]:
    """Yields the block of a call dict(field=value, ...), and those within it."""
    own, name = {}, ""
    lines = [keyword.end_lineno for keyword in call.keywords]
    for keyword in call.keywords:
        if keyword.arg is None:
            continue
        if inner := dict_of(keyword.value, named):
            yield from blocks_of(f"{place}.{keyword.arg}", inner, comments, named)
            continue
        own[keyword.arg] = comments.at(keyword) if lines.count(keyword.end_lineno) == 1 else ""  # of which is it?
        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
            name = str(keyword.value.value)
    yield Block(place, name, own)


def place_of(node: ast.expr) -> str:
    """Returns PLACE of the expression config.PLACE, "" for others."""
    text = ast.unparse(node)
    return text.removeprefix("config.") if re.fullmatch(r"config(\.\w+)+", text) else ""


def dict_of(node: ast.expr, named: dict[str, ast.expr]) -> ast.Call | None:
    """Returns the call dict(...) that an expression is: itself, within ConfigDict(...), or by its name."""
    if isinstance(node, ast.Name) and node.id in named:
        return dict_of(named[node.id], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "ConfigDict" and node.args:
            return dict_of(node.args[0], named)
        return node if node.func.id == "dict" else None
    return None


class Comments:
    """The comments of a source text, by what they are beside.

    Args:
      source: Python.
    """

    def __init__(self, source: str):
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        lines = source.splitlines()
        comments = [token for token in tokens if token.type == tokenize.COMMENT]
        self._beside = {token.start[0]: token.string.lstrip("# ") for token in comments}
        self._alone = {row for row in self._beside if lines[row - 1].lstrip().startswith("#")}

    def at(self, node: ast.keyword | ast.Assign) -> str:
        """Returns the comment beside the last line of an assignment, or else the lines of comment above it."""
        last = node.end_lineno or 0
        if last in self._beside and last not in self._alone:
            return self._beside[last]
        above, row = [], node.lineno - 1
        while row in self._alone:
            above.insert(0, self._beside[row])
            row -= 1
        return " ".join(above)
