"""`align score`: the reference of a whole dataset, measured once and kept; the runs of a sweep then find it."""

from align_cli import exits
from align_cli.commands import arguments


def main(argv: list[str]) -> int:
    """Compose, check and measure; returns the exit code."""
    given = arguments.parse(argv)
    if given.show_config:
        given.print_config()
        return exits.DONE
    tree = given.compose()
    from align_cli import launch

    return launch.fill(tree)
