"""`align reproduce`: a recipe's runs, evaluated and held against what its paper claims; or the list of all recipes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_cli import config, exits, secrets, terminal
from align_cli.commands.arguments import FOLDERS, NEEDS, PLUGINS, folders_of
from align_cli.commands.listing import print_table
from align_cli.errors import UserError
from align_cli.reproduction import loading, record
from align_cli.reproduction.recipe import SCALES

USAGE = "align reproduce NAME|FILE [scale=tiny|paper] [seeds=N] [jobs=N] [dir=DIR] [shrink=ROWS] [--plan] [--json]"
HELP = (
    "A table or figure of a paper: its runs, measured, held against what it claims.\n"
    "--plugin PACKAGE and --config-dir DIR as for align train."
)
KEYS = ("scale", "seeds", "jobs", "dir", "shrink")
FLAGS = ("--plan", "--json", "--list", PLUGINS, FOLDERS)
HOME = Path("reproductions")


@dataclass(frozen=True)
class Asked:
    """The command line."""

    name: str | None
    scale: str
    seeds: int | None
    jobs: int | None
    folder: Path | None
    shrink: Path | None
    flags: frozenset[str]
    config_dirs: tuple[str, ...]


def main(argv: list[str]) -> int:
    """Reproduce one recipe, plan it, or list all; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        terminal.result(f"{USAGE}\nalign reproduce --list\n\n{HELP}")
        return exits.DONE
    asked = parse(argv)
    if "--list" in asked.flags:
        return listed()
    if asked.name is None:
        raise UserError(f"give the name or file of a recipe: {USAGE}. `align reproduce --list` lists the recipes.")
    from align_cli.commands import reproducing  # here, so that recipes are listed without it

    return reproducing.reproduce(asked, asked.name, HOME)


def parse(argv: Sequence[str]) -> Asked:
    """Read the command line.

    Raises:
        UserError: all that is wrong with it.
    """
    secrets.refuse_secrets(argv)
    names: list[str] = []
    flags: set[str] = set()
    folders: dict[str, list[str]] = {flag: [] for flag in NEEDS}
    given: dict[str, str] = {}
    problems: list[str] = []
    words = iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        if key in folders:
            value = value or next(words, "")
            folders[key].append(value)
            if not value:
                problems.append(NEEDS[key])
        elif word in FLAGS:
            flags.add(word)
        elif word.startswith("-"):
            problems.append(f"{word}: no such option.{config.did_you_mean(key, FLAGS)} {USAGE}.")
        elif equals and key in KEYS:
            given[key] = value
        elif equals and not Path(word).is_file():
            problems.append(f"{word}: no such key.{config.did_you_mean(key, KEYS)} It takes {', '.join(KEYS)}.")
        else:
            names.append(word)
    if len(names) > 1:
        problems.append(f"{' '.join(names)}: give one recipe at a time.")
    counts = {key: _count(key, given[key], problems) for key in ("seeds", "jobs") if key in given}
    scale = given.get("scale", SCALES[0])
    if scale not in SCALES:
        problems.append(f"scale={scale}: use {' or '.join(SCALES)}.")
    for key in ("dir", "shrink"):
        if given.get(key) == "":
            problems.append(f"{key}=: give a folder.")
    if problems:
        raise UserError("\n".join(problems))
    config.use(folders[PLUGINS])
    return Asked(
        name=names[0] if names else None,
        scale=scale,
        seeds=counts.get("seeds"),
        jobs=counts.get("jobs"),
        folder=Path(given["dir"]) if "dir" in given else None,
        shrink=Path(given["shrink"]) if "shrink" in given else None,
        flags=frozenset(flags),
        config_dirs=(*folders[FOLDERS], *folders_of(folders[PLUGINS])),
    )


def _count(key: str, value: str, problems: list[str]) -> int | None:
    if re.fullmatch(r"[1-9]\d{0,5}", value):
        return int(value)
    problems.append(f"{key}={value}: use a whole number from 1 on.")
    return None


def listed() -> int:
    """All recipes, what they cost at scale tiny, and their last verdicts."""
    rows: list[list[str]] = []
    for name, path in loading.names().items():
        try:
            loaded = loading.load(name)
        except UserError as error:
            rows.append([name, "", "", f"refused: {error}"])
            continue
        rows.append([name, loaded.title, loaded.scales["tiny"].cost, last_verdict(name, path)])
    print_table(["recipe", "title", "cost, tiny", "last verdicts"], rows)
    return exits.DONE


def last_verdict(name: str, path: Path) -> str:
    """How many claims had which verdict at scale tiny, here or where the committed results were made."""
    here, shipped = HOME / f"{name}-tiny" / record.RESULTS, path.with_suffix(".results.json")
    for file, where in ((here, "here"), (shipped, "published")):
        try:
            told = record.read(file)
        except UserError as error:
            return str(error)
        if told is not None:
            return f"{tally(told)} ({where}, {told['date']})"
    return "not run yet"


def tally(results: dict[str, Any]) -> str:
    """How many claims had which verdict."""
    verdicts = [each["verdict"] for each in results["expectations"]]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
