"""Errors that end a run with one line instead of a traceback."""


class RunError(RuntimeError):
    """A run cannot continue for a reason outside the code. The message is one line, with what to do."""


def one_line(error: BaseException, longest: int = 300) -> str:
    """Returns an error's message as one line of at most `longest` characters; the name of its class if it is empty."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= longest else line[: longest - 3] + "..."
