"""One seed of a study (`align_cli.studies`): called, and kept in a file that says what was asked."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align_cli import config, rundir
from align_cli.errors import UserError


def find(name: str) -> Callable[..., Mapping[str, float]]:
    """The function of a study.

    Raises:
        UserError: there is none.
    """
    return config.find("align_cli.studies", name, "study")


def make(name: str, options: Mapping[str, Any], seed: int, file: Path | None) -> dict[str, float]:
    """The figures of one seed; kept in `file`, if there is one, which is made only once.

    Raises:
        UserError: an option is wrong, or the file holds something else.
    """
    function = find(name)
    problems = config.check(function, options, name)
    if problems:
        raise UserError("\n".join(problems))
    if file is not None and check(file, name, options, seed):
        return read(file)["figures"]
    figures = {key: float(value) for key, value in function(seed, **options).items()}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        plain = {key: rundir.plain(value) for key, value in figures.items()}
        told = {"study": name, "options": options, "seed": seed, "figures": plain}
        rundir.write_atomic(file, json.dumps(told, indent=2) + "\n")
    return figures


def check(file: Path, name: str, options: Mapping[str, Any], seed: int) -> bool:
    """Whether a file holds this seed of this study already.

    Raises:
        UserError: it holds another one, or something else.
    """
    if not file.is_file():
        return False
    there = read(file)
    if (there["study"], there["options"], there["seed"]) != (name, dict(options), seed):
        told = f"seed {there['seed']} of {there['study']} with {there['options']}"
        raise UserError(f"{file} holds {told}; remove it, or choose another folder.")
    return True


def read(file: Path) -> dict[str, Any]:
    """What `make` has kept.

    Raises:
        UserError: the file is damaged.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if not {"study", "options", "seed", "figures"} <= set(told):
            raise ValueError("some of its keys are missing")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is not the result of a study. Remove it, and it is made again.") from error
    return told
