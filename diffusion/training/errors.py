"""What ends a run with one line instead of a traceback."""


class RunError(RuntimeError):
    """A run that cannot go on for a reason outside the code; the message is one line that says what to do."""


def one_line(error: BaseException, longest: int = 300) -> str:
    """Returns an error's message as one line of at most `longest` characters; its class where it has none."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= longest else line[: longest - 3] + "..."
