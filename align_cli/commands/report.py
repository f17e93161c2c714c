"""`align report`: one HTML page about a run, or about several, that needs nothing beside itself."""

from collections.abc import Sequence
from pathlib import Path

from align_cli import comparison, exits, rundir, terminal, tracking
from align_cli.commands.arguments import Parser
from align_cli.comparison import LeftOut
from align_cli.config import did_you_mean
from align_cli.errors import UserError
from align_cli.report import content, page, several, single
from align_cli.report.content import Content

OPTIONS = ("out=", "metric=")
PAGE = "report.html"
OF_RUNS, RESULTS = "runs.html", "results.json"  # a reproduction's folder has the latter, and a page of its own
WHOLE = 64  # runs whose courses are all read
HEAD = 1024  # bytes of a file that tell whether it is a page of ours


def main(argv: list[str]) -> int:
    """`report RUN_OR_SWEEP ... [out=FILE] [metric=NAME]`; returns the exit code."""
    parser = Parser(
        prog="align report",
        usage="align report RUN_OR_SWEEP ... [out=FILE] [metric=NAME]",
        description="Write a page about a run or several: verdicts, curves, heat maps, samples, and what was run. It "
        "is one HTML file, and needs no network.",
        epilog=f"Without out= it is {PAGE} in the folder that is given, {OF_RUNS} in one of align reproduce. metric= "
        "is a name of summary.json by which several runs are compared; without it that of "
        f"{', '.join(comparison.METRICS)} which most of them have.",
    )
    parser.add_argument("given", nargs="+", metavar="RUN_OR_SWEEP", help="a run directory, or a folder with some below")
    folders, out, metric = split(parser.parse_args(argv).given)
    paths = comparison.find(folders)
    if metric is not None and len(paths) == 1:
        raise UserError(
            f"metric={metric} compares runs, and {paths[0]} is one; without it its page has all its figures."
        )
    where = _where(folders, out)
    unread: list[LeftOut] = []
    runs: list[Content] = []
    for path in paths:
        try:
            runs.append(content.read(path, whole=len(paths) <= WHOLE))
        except UserError as error:  # one run that cannot be read does not hide the others
            unread.append(LeftOut(str(path), f"unreadable: {error}"))
    if not runs:
        raise UserError(f"{unread[0].run} cannot be read: {unread[0].why.removeprefix('unreadable: ')}")
    if len(paths) == 1:
        title, sections = single.title(runs[0]), single.sections(runs[0])
    else:
        title, sections = f"{len(paths)} runs in {_named(folders)}", several.sections(runs, unread, metric)
    page.write(where, title, sections)
    if len(paths) == 1 and runs[0].state == "finished":
        step = int(max((row["step"] for row in runs[0].steps), default=0)) + 1
        text = where.read_text(encoding="utf-8")
        tracking.publish(paths[0], rundir.read_config(paths[0]), "report", text, step=step)
    if len(paths) > 1 and len(folders) == 1:
        read = [rundir.read_config(run.path) for run in runs]
        tracking.publish_of_sweep(Path(folders[0]), read, "report", where.read_text(encoding="utf-8"))
    terminal.result(str(where))
    return exits.DONE


def split(given: Sequence[str]) -> tuple[list[str], str | None, str | None]:
    """The folders, the file of `out=` and the figure of `metric=`; a folder's name may hold an = sign itself.

    Raises:
        UserError: an option is empty, given twice or misspelt, or there is no folder.
    """
    folders: list[str] = []
    options: dict[str, str] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if equals and f"{key}=" in OPTIONS:
            if not value or key in options:
                raise UserError(f"{word}: give one {'file' if key == 'out' else 'name'} after {key}=.")
            options[key] = value
        elif Path(word).is_dir():
            folders.append(word)
        else:
            near = did_you_mean(f"{key}=", OPTIONS) if equals else ""
            raise UserError(f"{word}: there is no such folder.{near} Give a run directory or a sweep's.")
    if not folders:
        raise UserError("align report needs a run directory, or a folder of runs such as a sweep's.")
    return folders, options.get("out"), options.get("metric")


def _where(folders: Sequence[str], out: str | None) -> Path:
    """The file to write.

    Raises:
        UserError: it is not clear, or it would replace something else than a page.
    """
    if out is None and len(folders) > 1:
        raise UserError(f"{len(folders)} folders are given; out=FILE says where their page goes.")
    usual = OF_RUNS if Path(folders[0], RESULTS).is_file() else PAGE
    path = Path(folders[0], usual) if out is None else Path(out)
    if path.is_dir():
        raise UserError(f"out={path} is a folder; give a file in it, such as out={path / PAGE}.")
    if not path.parent.is_dir():
        raise UserError(f"out={path}: there is no folder {path.parent}.")
    if path.exists():
        with open(path, "rb") as file:
            if page.GENERATOR.encode() not in file.read(HEAD):
                raise UserError(f"{path} exists and is not a page of align report; use another out=.")
    return path


def _named(folders: Sequence[str]) -> str:
    return ", ".join(Path(folder).resolve().name for folder in folders)
