"""`align train`: one run, or with -m every combination."""

import sys

from align_cli import exits, sweep
from align_cli.commands import arguments


def main(argv: list[str]) -> int:
    """Compose, check and launch; returns the exit code."""
    given = arguments.parse(argv)
    if given.multirun:
        return sweep.sweep(given.overrides, given.config_dirs)
    if given.show_config:
        given.print_config()
        return exits.DONE
    tree = given.compose()
    from align_cli.launch import launch

    return launch(tree, sys.argv)
