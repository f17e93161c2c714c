"""`align chat`: a conversation with a run or a model, or with two side by side."""

import contextlib
import importlib
import io
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from align_cli import config, exits, paths, terminal
from align_cli.commands import arguments
from align_cli.errors import UserError

if TYPE_CHECKING:
    from align_cli.chat import Answer, Speaker

USAGE = "align chat RUN_OR_MODEL [--against RUN_OR_MODEL] [temperature=T] [system=TEXT] [key=value ...]"
WORDS = "/reset begins anew, /system TEXT does so with a system message, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?")
NARROWEST = 40  # characters of a column
GAP = 3  # between two


def main(argv: Sequence[str]) -> int:
    """`chat RUN_OR_MODEL [--against RUN_OR_MODEL] [key=value ...]`; returns the exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        terminal.result(f"{USAGE}\n\n{WORDS}.\n\n{arguments.explained('chat')}")
        return exits.DONE if argv else exits.USER
    names, rest = named(argv)
    given = arguments.parse(rest)
    if given.show_config:
        given.print_config("chat")
        return exits.DONE
    tree = given.compose("chat")
    from align_cli import cache, chat, launch, subject

    problems = config.check(chat.Options, tree, "")
    if problems:
        raise UserError("\n".join(problems))
    launch.refuse_foreign_ranks("chat")
    options = config.build(chat.Options, tree)
    generate = options.generate()
    with cache.in_use(paths.cache()):
        speakers = [chat.Speaker(subject.find(name, generate), options) for name in names]
        for speaker in speakers:
            assert speaker.subject.model is not None  # loaded before anything is said
        talk(speakers)
    return exits.DONE


def named(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models that the command line names, and its other arguments.

    Raises:
        UserError: none is named, or --against stands without one.
    """
    words = list(argv)
    first = words.pop(0)
    if first.startswith("-"):
        raise UserError(f"{first}: the run or model comes first: {USAGE}")
    names, rest = [first], []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag != "--against":
            rest.append(word)
            continue
        other = value if equals else words.pop(0) if words else ""
        if not other or ("=" in other and not Path(other).exists()) or len(names) > 1:
            raise UserError(f"--against: give one run or model: {USAGE}")
        names.append(other)
    return names, rest


# --- the conversation


def talk(speakers: Sequence["Speaker"]) -> None:
    """Answer what is said until the end of standard input, or /exit."""
    for speaker in speakers:
        if not speaker.chats:
            name = terminal.visible(speaker.subject.name)
            terminal.say(f"{name} has no chat template: it goes on with each text as it is, and remembers none")
    interactive = sys.stdin.isatty() and terminal.is_live(sys.stdout)
    if interactive:
        terminal.say(WORDS)
    for line in typed() if interactive else piped():
        command = COMMAND.fullmatch(line)
        if command is not None and command[1] == "exit":
            return
        if command is not None:
            obey(speakers, command[1], command[2] or "")
        elif line.strip():
            answer(speakers, line)


def typed() -> Iterator[str]:
    """What is typed on a terminal, a line at a time."""
    with contextlib.suppress(ModuleNotFoundError):  # some builds of Python lack it
        importlib.import_module("readline")  # arrows and history in `input`
    while True:
        try:
            yield input("> ")
        except EOFError:
            terminal.result("")
            return
        except KeyboardInterrupt:
            terminal.say("\n/exit or Ctrl-D leaves")


def piped() -> Iterator[str]:
    """The lines of standard input; what is not UTF-8 in it is replaced."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def obey(speakers: Sequence["Speaker"], command: str, text: str) -> None:
    """Do what a line that begins with a slash asks for."""
    if command not in ("reset", "system") or (command == "system" and not text.strip()):
        terminal.say(f"/{terminal.visible(command)}: {WORDS}; a space before the slash makes it something that is said")
        return
    for speaker in speakers:
        if command == "reset":
            speaker.reset()
            continue
        try:
            speaker.begin(text)
        except UserError as error:
            terminal.error(terminal.visible(str(error)))


def answer(speakers: Sequence["Speaker"], said: str) -> None:
    """Have every model answer, in columns where the terminal has room for them."""
    console = Console()
    with interruptible() as stopped:
        if len(speakers) > 1 and terminal.is_live(sys.stdout) and console.width >= 2 * NARROWEST + GAP:
            in_columns(speakers, said, stopped, console)
        else:
            in_turn(speakers, said, stopped)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C stops nothing but is noted; yields whether it has come."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def in_turn(speakers: Sequence["Speaker"], said: str, stopped: Callable[[], bool]) -> None:
    """The answers one after the other, each below its model's name where there are several."""

    def show(new: str) -> bool:
        sys.stdout.write(terminal.visible(new))
        sys.stdout.flush()
        return stopped()

    for speaker in speakers:
        if len(speakers) > 1:
            terminal.result(heading(speaker))
        asked(speaker, said, show)


def in_columns(speakers: Sequence["Speaker"], said: str, stopped: Callable[[], bool], console: Console) -> None:
    """The answers side by side; while they are written, as many of the last lines as the terminal has."""
    texts = [Text() for _ in speakers]
    names = [terminal.visible(speaker.subject.name) for speaker in speakers]
    notes: list[str] = []
    with Live(console=console, transient=False, refresh_per_second=12) as live:
        for speaker, text in zip(speakers, texts, strict=True):

            def show(new: str, text: Text = text) -> bool:
                text.append(terminal.visible(new))
                live.update(columns(names, texts, console, most=console.height - 2))
                return stopped()

            try:
                notes += cut(speaker, speaker.answer(said, show))
            except UserError as error:
                notes.append(str(error))
        live.update(columns(names, texts, console, most=None))
    for note in notes:
        terminal.say(terminal.visible(note))


def columns(names: Sequence[str], texts: Sequence[Text], console: Console, *, most: int | None) -> Table:
    """Texts side by side below their names; of each the last `most` lines."""
    width = (console.width - GAP * (len(texts) - 1)) // len(texts)
    table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    wrapped = [text.wrap(console, width) for text in texts]
    for _ in texts:
        table.add_column(width=width, no_wrap=True)
    table.add_row(*(Text(name, style="bold") for name in names))
    table.add_row(*(Text("\n").join(lines[-most:] if most is not None else lines) for lines in wrapped))
    return table


def heading(speaker: "Speaker") -> str:
    """The name of a model, above its answer."""
    return terminal.paint(f"{terminal.visible(speaker.subject.name)}:", "bold", sys.stdout)


def asked(speaker: "Speaker", said: str, show: Callable[[str], bool]) -> None:
    """Have a model answer below what stands there; what it cannot answer is said, and the conversation goes on."""
    try:
        notes = cut(speaker, speaker.answer(said, show))
        terminal.result("")
    except UserError as error:
        terminal.error(terminal.visible(str(error)))
        return
    for note in notes:
        terminal.say(terminal.visible(note))


def cut(speaker: "Speaker", found: "Answer") -> list[str]:
    """A note on an answer that did not end."""
    name = speaker.subject.name
    return [] if found.ended else [f"({name}: cut after {found.tokens} tokens; max_new_tokens= allows more)"]
