"""The errors that a command ends with on purpose."""


class UserError(ValueError):
    """A mistake in what the user gave: says what was wrong, what was given, and how to fix it.

    Commands print it as one line and end with exit code 2.
    """


class RunError(RuntimeError):
    """A run cannot go on, and says why: the loss is not a number, the disk is full. Nothing that was saved is touched.

    Commands print it as one line and end with exit code 1.
    """


class Stopped(Exception):
    """A signal asked a run to stop; it has saved and can be resumed.

    Attributes:
        command: what goes on from there.
    """

    def __init__(self, told: str, command: str = "the same command"):
        super().__init__(told)
        self.command = command


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where it has none."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
