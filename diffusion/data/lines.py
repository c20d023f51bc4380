"""Text files read line by line: captions, prompts."""

import os
from pathlib import Path


def read_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    r"""Returns (number, text) of every line of a UTF-8 file that is not blank; the first line is number 1.

    Lines end at "\n" or "\r\n" alone: other separators of Unicode (U+0085, U+2028, the form feed) are characters of the
    text. A byte order mark at the start of the file is dropped.

    Raises:
      ValueError: if the file cannot be read, or a line is not UTF-8, which a lone surrogate is not either.
    """
    try:
        content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error})") from error
    lines = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if text.strip():
            lines.append((number, text))
    return lines
