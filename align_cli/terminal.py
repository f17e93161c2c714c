"""Lines on the terminal: results go to standard output, everything else to standard error."""

import contextlib
import os
import shlex
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID

Style = Literal["bold", "dim", "red", "green", "yellow"]
_CODES: dict[Style, int] = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}


def is_live(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which a progress bar can redraw itself."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colour(stream: TextIO) -> bool:
    """Whether a stream takes colour: it is a terminal, and NO_COLOR (https://no-color.org) is unset or empty."""
    return is_live(stream) and not os.environ.get("NO_COLOR")


def paint(text: str, style: Style, stream: TextIO) -> str:
    """The text in a style where the stream takes colour, the text itself elsewhere."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if has_colour(stream) else text


def visible(text: str) -> str:
    """`text` with whatever could drive a terminal, or show characters in another order, as escapes."""
    return "".join(one if _is_plain(one) else ascii(one)[1:-1] for one in text)


def _is_plain(one: str) -> bool:
    # beside what is printable: other spaces, and the joiners without which Persian and many emojis fall apart
    return one.isprintable() or one in "\n\t\u200c\u200d" or unicodedata.category(one) == "Zs"


def result(text: str) -> None:
    """A line that the user asked for: standard output."""
    print(text, flush=True)


def say(text: str) -> None:
    """A line about what is going on: standard error. Where it cannot be written any longer, work goes on without it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # its reader went away, its terminal was closed, the disk of its file is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what is still buffered has to go somewhere


def silent(text: str) -> None:
    """Say nothing; for ranks other than 0."""


def warn(text: str) -> None:
    """A line about something the user should know: standard error."""
    say(f"{paint('warning:', 'yellow', sys.stderr)} {text}")


def error(text: str) -> None:
    """The line that a command ends with when it fails: standard error."""
    say(f"{paint('error:', 'red', sys.stderr)} {text}")


def shell(words: Iterable[str]) -> str:
    """A command line as it is typed; Hydra's own quotes go into double ones, which reads better than shlex has it."""
    typed = []
    for word in words:
        plain = "'" in word and not any(special in word for special in '"$`\\!\n')
        typed.append(f'"{word}"' if plain else shlex.quote(word))
    return " ".join(typed)


def quiet_libraries() -> None:
    """Keep what libraries say about themselves out of the user's output."""
    for library in ("torch", "transformers", "peft", "accelerate", "deepspeed"):
        for category in (FutureWarning, RuntimeWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{library}\b")


@contextlib.contextmanager
def counter() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error where that is a terminal; it is told what, how much, and of how much."""
    if not is_live(sys.stderr):
        yield lambda what, done, of: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=done)

        yield update
