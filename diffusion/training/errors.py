"""What ends a run with one line instead of a traceback."""


class RunError(RuntimeError):
    """A run that cannot go on for a reason outside the code; the message is one line that says what to do."""
