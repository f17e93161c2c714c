"""`align ls`, `align show`, `align cp`: the configuration groups, the recipes and the runs, as files."""

import argparse
import shutil
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from align_cli import config, paths, results, terminal
from align_cli.commands.arguments import Parser
from align_cli.errors import UserError
from align_cli.reproduction import loading
from align_cli.rundir import CONFIG, flatten, holder, read_config, read_summary

RECIPES = "recipes"
RUNS = "runs"
_RUN_FOLDERS = ("runs", "sweeps")  # where `align train` puts runs
# What a run's line shows: heading, key of config.yaml or summary.json.
_CHOSEN = {"algo": "algo.name", "model": "model.name", "data": "data.name", "engine": "engine.name"}
_FIGURES = {"steps": "steps", "loss": "loss/last", "exact match": "eval/after/exact_match"}


def catalogue() -> dict[str, Path]:
    """Every YAML that can be named: `algo/nca`, `recipes/nca/figure5`, `train`."""
    found: dict[str, Path] = {}
    for prefix, root in (("", paths.conf()), (f"{RECIPES}/", paths.recipes())):
        for path in sorted(root.rglob("*.yaml")):
            found[prefix + path.relative_to(root).with_suffix("").as_posix()] = path
    return found


def find(name: str) -> tuple[str, Path]:
    """The one entry of the catalogue that a name means: the whole of it, or its end (`nca` for `algo/nca`).

    Raises:
        UserError: none, or more than one.
    """
    wanted = name.replace("=", "/").removesuffix(".yaml").strip("/")
    entries = catalogue()
    if wanted in entries:
        return wanted, entries[wanted]
    ends = [entry for entry in entries if entry.endswith(f"/{wanted}")]
    if len(ends) == 1:
        return ends[0], entries[ends[0]]
    if ends:
        raise UserError(f"'{name}' could be {', '.join(ends)}; name the group too")
    short = {entry.rpartition("/")[2]: entry for entry in entries} | {entry: entry for entry in entries}
    near = dict.fromkeys(short[match] for match in get_close_matches(wanted, short))
    hint = f"did you mean {' or '.join(near)}?" if near else "`align ls` lists what there is"
    raise UserError(f"there is no configuration, recipe or run named '{name}'; {hint}")


def title(entry: str, path: Path) -> str:
    """What a YAML says of itself: a recipe's title, else its comment lines at the top, without Hydra's directive."""
    if entry.startswith(f"{RECIPES}/"):
        return loading.title(path)
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.lstrip("# "))
    return " ".join(comment)


def _runs(folders: list[str]) -> Iterator[Path]:
    roots = [Path(folder) for folder in folders] or [Path(folder) for folder in _RUN_FOLDERS]
    for root in roots:
        if folders and not root.is_dir():
            raise UserError(f"{root} is not a folder; `align ls runs FOLDER` lists the runs below it")
        yield from sorted(path.parent for path in root.rglob(CONFIG))


def _status(run: Path, finished: bool) -> str:
    using = holder(run)
    if using is not None:
        return f"in use by {using}"
    if finished:
        return "finished"
    return "stopped" if (run / "metrics.jsonl").exists() else "not started"


def _run_line(run: Path) -> list[str]:
    try:
        config = flatten(read_config(run))
        summary = read_summary(run)
    except UserError as error:  # one run that cannot be read does not hide the others
        return [str(run), *([""] * (len(_CHOSEN) + len(_FIGURES))), f"unreadable: {error}"]
    figures: dict[str, Any] = summary or {}

    def shown(values: dict[str, Any], key: str) -> str:
        if key not in values:
            return ""
        return f"{values[key]:.4g}" if isinstance(values[key], float) else str(values[key])

    return [
        str(run),
        *(shown(config, key) for key in _CHOSEN.values()),
        *(shown(figures, key) for key in _FIGURES.values()),
        _status(run, summary is not None),
    ]


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    """Print rows under headings: fitted into a terminal, whole lines into a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    # a pipe gets whole lines, however long
    console = Console(width=None if sys.stdout.isatty() else 1000, no_color=not terminal.has_colour(sys.stdout))
    with console.capture() as printed:
        console.print(table, highlight=False)
    for line in printed.get().splitlines():
        terminal.result(line.rstrip())


def ls(arguments: argparse.Namespace) -> int:
    """List a group, the recipes, the runs, or, without a name, what there is to list."""
    if arguments.what == RUNS:
        rows = [_run_line(run) for run in _runs(arguments.folders)]
        if not rows:
            where = " or ".join(arguments.folders or _RUN_FOLDERS)
            terminal.say(f"there are no runs under {where}; `align train` makes one")
            return 0
        print_table(["run", *_CHOSEN, *_FIGURES, "status"], rows)
        return 0
    entries = {entry: path for entry, path in catalogue().items() if not _example(entry)}
    groups = sorted({entry.partition("/")[0] for entry in entries if "/" in entry} | {RECIPES})
    if arguments.what is None:
        rows = [
            [
                group,
                " ".join(entry.partition("/")[2] for entry in entries if entry.startswith(f"{group}/")) or "none yet",
            ]
            for group in groups
        ]
        print_table(["group", "choices"], rows)
        terminal.say("`align ls GROUP` says what each is, `align show NAME` prints it, `align ls runs` lists runs")
        return 0
    wanted = next((group for group in groups if arguments.what in (group, f"{group}s", group.removesuffix("s"))), None)
    if wanted is None:
        near = get_close_matches(arguments.what, [*groups, RUNS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"the groups are {', '.join([*groups, RUNS])}"
        raise UserError(f"there is no group '{arguments.what}'; {hint}")
    rows = [
        [entry.partition("/")[2], title(entry, path)]
        for entry, path in entries.items()
        if entry.startswith(f"{wanted}/")
    ]
    if not rows:
        terminal.say(f"there are no {wanted} yet")
        return 0
    print_table([wanted, "what it is"], rows)
    return 0


def _example(entry: str) -> bool:
    group, _, name = entry.partition("/")
    return group == "scorer" and config.is_example(name)


def show(arguments: argparse.Namespace) -> int:
    """Print a YAML, a run's summary and evaluations (its configuration, while there is no summary), or a model's."""
    run = Path(arguments.name)
    if (run / CONFIG).is_file():
        summary = read_summary(run)
        if summary is None:
            terminal.say(f"{run} is {_status(run, finished=False)} and has no summary; this is its configuration")
            terminal.result((run / CONFIG).read_text(encoding="utf-8").rstrip())
            return 0
        evaluated = [results.read(path) for path in results.all_of(run)]
        told = tuple(f"{results.FOLDER}/{each.name}/" for each in evaluated)
        figures = {name: value for name, value in summary.items() if not name.startswith(told)}
        width = max(map(len, figures), default=0)
        for name, value in figures.items():
            terminal.result(f"{name:<{width}}  {value}")
        _show_evaluations(evaluated)
        return 0
    if results.all_of(run):
        _show_evaluations([results.read(path) for path in results.all_of(run)])
        return 0
    entry, path = find(arguments.name)
    terminal.say(terminal.paint(f"{entry}: {path}", "dim", sys.stderr))
    terminal.result(path.read_text(encoding="utf-8").rstrip())
    return 0


def _show_evaluations(evaluated: list[results.Finished]) -> None:
    """What `align evaluate` has found, and what is to be said of it."""
    if evaluated:
        terminal.result("")
        print_table(results.HEADINGS, [row for each in evaluated for row in results.rows_of(each)])
    for each in evaluated:
        for note in each.notes:
            terminal.result(f"{each.name}: {note}")


def cp(arguments: argparse.Namespace) -> int:
    """Copy a YAML; an existing file is never overwritten."""
    entry, path = find(arguments.name)
    destination = Path(arguments.destination)
    if destination.is_dir() or arguments.destination.endswith("/"):
        destination = destination / path.name
    if destination.suffix != ".yaml":
        destination = destination.with_name(destination.name + ".yaml")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as source, open(destination, "xb") as copy:
            shutil.copyfileobj(source, copy)
    except FileExistsError as error:
        there = error.filename or destination
        raise UserError(f"{there} exists; remove it, or copy to another name") from error
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error.strerror}") from error
    terminal.say(f"{entry} copied to {destination}")
    return 0


def main(argv: list[str]) -> int:
    """Run `ls`, `show` or `cp`: the first argument says which."""
    parser = Parser(prog="align")
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("ls", help="list groups, recipes or runs", description=ls.__doc__)
    listing.add_argument("what", nargs="?", help="a group (algo, model, data, ...), recipes, or runs")
    listing.add_argument(
        "folders", nargs="*", help=f"with runs: where to look; without it {' and '.join(_RUN_FOLDERS)}"
    )
    listing.set_defaults(command=ls)
    showing = commands.add_parser(
        "show", help="print a recipe, a group's YAML or a run's summary", description=show.__doc__
    )
    showing.add_argument("name", help="algo/nca, recipes/nca/figure5, or the folder of a run")
    showing.set_defaults(command=show)
    copying = commands.add_parser("cp", help="copy a recipe or a group's YAML", description=cp.__doc__)
    copying.add_argument("name", help="algo/nca, recipes/nca/figure5")
    copying.add_argument("destination", help="a new file or an existing folder")
    copying.set_defaults(command=cp)
    arguments = parser.parse_args(argv)
    return arguments.command(arguments)
