"""Errors that end a run with one line instead of a traceback."""


class RunError(RuntimeError):
    """A run cannot continue for a reason outside the code. The message is one line, with what to do."""


def one_line(error: BaseException, longest: int = 300) -> str:
    """Returns an error's message as one line of at most `longest` characters; the name of its class if it is empty.

    A longer one loses its middle: what failed is at its beginning, and often why at its end, behind long paths.
    """
    line = " ".join(str(error).split()) or type(error).__name__
    if len(line) <= longest:
        return line
    end = (longest - 5) // 2
    return f"{line[: longest - 5 - end]} ... {line[-end:]}"
