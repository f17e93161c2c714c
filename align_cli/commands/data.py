"""`align data show`: a tokenised example of the data that a run would train on."""

from rich.console import Console

from align_cli import cache, exits, paths, reading
from align_cli.commands import arguments
from align_cli.errors import UserError


def main(argv: list[str]) -> int:
    """`data show [index=N] [key=value ...]`; returns the exit code."""
    if not argv or argv[0] != "show":
        raise UserError("align data: the subcommand is show, as in align data show data=hh data.path=FILE.")
    places = [argument for argument in argv[1:] if argument.startswith("index=")]
    given = arguments.parse([argument for argument in argv[1:] if argument not in places])
    index = _index(places)
    if given.show_config:
        given.print_config()
        return exits.DONE
    checked = reading.read(reading.placed(given.compose(), "unused"))

    from align_cli.data.show import show
    from align_cli.run import prepare

    with cache.in_use(paths.cache()):
        prepared = prepare(checked)
        show(prepared.train, prepared.tokenizer, index, Console())
    return exits.DONE


def _index(places: list[str]) -> int:
    text = places[-1].partition("=")[2] if places else "0"
    if not text.isdigit():
        raise UserError(f"index={text}: use a number from 0 on.")
    return int(text)
