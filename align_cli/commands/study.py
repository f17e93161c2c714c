"""`align study`: one seed of a study on an enumerable model, which is what a recipe without runs consists of."""

from pathlib import Path
from typing import Any

import yaml

from align_cli import config, exits, study, terminal
from align_cli.commands import arguments
from align_cli.errors import UserError

USAGE = "align study NAME [seed=N] [out=FILE] [--plugin PACKAGE] [OPTION=VALUE ...]"


def main(argv: list[str]) -> int:
    """`study NAME [seed=N] [out=FILE] [OPTION=VALUE ...]`; returns the exit code.

    Raises:
        UserError: what is wrong with the arguments, or with the file.
    """
    if {"-h", "--help"} & set(argv):
        terminal.result(f"{USAGE}\n\nOne seed of a study on an enumerable model; with out=FILE, kept there.")
        return exits.DONE
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        raise UserError(f"give the name of a study: {USAGE}.")
    given = arguments.parse(argv[1:])
    if given.multirun or given.show_config or given.folders:
        raise UserError(
            f"-m, --cfg and --config-dir are of commands with a configuration; a study has options alone. Use {USAGE}."
        )
    options: dict[str, Any] = {}
    for override in given.overrides:
        key, _, value = override.partition("=")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{override}: cannot be read as YAML.") from error
    seed, out = options.pop("seed", 0), options.pop("out", None)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed={config.shown(seed)}: use 0 or a larger whole number.")
    with exits.terminable():
        figures = study.make(argv[0], options, seed, None if out is None else Path(str(out)))
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        terminal.result(f"{name:<{width}}  {value}")
    return exits.DONE
