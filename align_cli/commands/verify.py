"""`align verify`: algorithms held against what their papers prove, on a language model small enough to know it all."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict

from align_cli import exits, process, terminal
from align_cli.commands import arguments
from align_cli.commands.arguments import Parser
from align_cli.commands.listing import print_table
from align_cli.verify.checks import Check

MEANING = (
    "KL, in nats, is exact; its tolerance is that of a policy of which 1 % is still the reference,\n"
    "10 % where a run learns from samples. --json has each statement and its source."
)


def main(argv: list[str]) -> int:
    """`verify [ALGO ...] [--json] [--plugin PACKAGE]`; returns 0 if everything holds, 1 if not."""
    parser = Parser(
        prog="align verify",
        usage="align verify [ALGO ...] [--json] [--plugin PACKAGE] [--config-dir DIR]",
        description="Train algorithms by the ordinary loop on a language model whose every expectation is a sum, and "
        "hold values, gradients and the policies that they reach against what their papers prove.",
        epilog="Without names: all algorithms. --plugin examines those of a package of your own, too; a function "
        "`optimum` beside a loss says where it rests (CONTRIBUTING.md).",
    )
    parser.add_argument("algorithms", nargs="*", metavar="ALGO", help="names of the group algo")
    parser.add_argument("--json", action="store_true", help="the same as JSON, with statements and sources")
    parser.add_argument("--plugin", action="append", default=[], metavar="PACKAGE", help="of your own")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="more choices of your own")
    given = parser.parse_intermixed_args(argv)
    flags = [f"--plugin={name}" for name in given.plugin] + [f"--config-dir={name}" for name in given.config_dir]
    found = arguments.parse(flags)
    from align_cli.verify import examine

    begun = time.perf_counter()
    subjects = examine.subjects(given.algorithms, found.config_dirs)
    terminal.say(f"{len(subjects)} to examine, each trained on the enumerable model; a few seconds each")
    rows: list[Check] = []
    with terminal.counter() as progress:
        for _, checks in examine.examine_all(subjects, found.config_dirs, processes=process.cores(), progress=progress):
            rows += checks
    seconds = time.perf_counter() - begun
    if given.json:
        terminal.result(as_json(rows))
    else:
        show(rows)
        terminal.result(f"{summary(rows)} {seconds:.0f} s.")
    return exits.DONE if all(row.passed for row in rows) else exits.FAILED


def show(rows: Sequence[Check]) -> None:
    """The table, an algorithm's name at its first row, and a line on each row that fails."""
    lines: list[list[str]] = []
    before = ""
    for row in rows:
        name, before = "" if row.algorithm == before else row.algorithm, row.algorithm
        expected = f"{'' if row.relation == '=' else row.relation + ' '}{number(row.expected)}"
        verdict = "ok" if row.passed else "FAILS"
        lines.append([name, row.check, number(row.measured), expected, number(row.tolerance), verdict])
    print_table(["algorithm", "check", "measured", "expected", "tolerance", "verdict"], lines)
    terminal.result("")
    terminal.result(MEANING)
    for row in rows:
        if not row.passed:
            terminal.result(why(row))


def why(row: Check) -> str:
    """A row that fails, in words."""
    if row.trouble:
        return f"{row.algorithm}: {row.check}: {row.trouble}"
    relation = "at least " if row.relation == "≥" else ""
    return (
        f"{row.algorithm}: {row.check} is {number(row.measured)} and should be {relation}{number(row.expected)}, up to "
        f"{number(row.tolerance)}: {row.statement} ({row.source})"
    )


def summary(rows: Sequence[Check]) -> str:
    """How many hold."""
    failing = sum(not row.passed for row in rows)
    return f"{failing} of {len(rows)} checks fail." if failing else f"All {len(rows)} checks hold."


def number(value: float) -> str:
    """Six digits of what is compared, none of what is not there."""
    return "–" if math.isnan(value) else f"{value:.6g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def as_json(rows: Sequence[Check]) -> str:
    """A list of the rows; a number that is none is null."""

    def told(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    table = [{**{key: told(value) for key, value in asdict(row).items()}, "passed": row.passed} for row in rows]
    return json.dumps(
        {"passed": all(row.passed for row in rows), "checks": table, "meaning": MEANING}, indent=2, ensure_ascii=False
    )
