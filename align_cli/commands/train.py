"""`align train`: one run, or with -m every combination."""

import sys

import yaml

from align_cli import exits, sweep, terminal
from align_cli.commands import arguments
from align_cli.errors import UserError


def main(argv: list[str]) -> int:
    """Compose, check and launch; returns the exit code."""
    given = arguments.parse(argv)
    if given.multirun:
        return sweep.sweep(given.overrides, given.config_dirs)
    combinations, swept = sweep.expand(given.overrides)
    if swept:
        raise UserError(f"{len(combinations)} combinations are given; add -m to run each of them.")
    tree = given.compose()
    if given.show_config:
        terminal.result(yaml.safe_dump(tree, sort_keys=False).rstrip())
        return exits.DONE
    from align_cli.launch import launch

    return launch(tree, sys.argv)
