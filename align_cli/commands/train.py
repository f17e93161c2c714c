"""`align train`: one run, or with -m every combination."""

import sys

from align_cli import exits, sweep
from align_cli.commands import arguments
from align_cli.errors import UserError


def main(argv: list[str]) -> int:
    """Compose, check and launch; returns the exit code.

    Raises:
        UserError: what is given cannot be composed, or is a sweep whose configuration is asked for.
    """
    given = arguments.parse(argv)
    if given.multirun and given.show_config:
        raise UserError("-m --cfg: each job has a configuration of its own; use --cfg with one value for each key.")
    if given.multirun:
        return sweep.sweep(given.overrides, given.config_dirs)
    if given.show_config:
        given.print_config()
        return exits.DONE
    tree = given.compose()
    from align_cli.launch import launch

    return launch(tree, sys.argv)
