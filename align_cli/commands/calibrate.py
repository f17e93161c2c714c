"""`align evaluate calibrate`: a judge and published preferences, side by side."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from align_cli import __version__, config, exits, results, terminal
from align_cli.commands import arguments
from align_cli.commands.listing import print_table
from align_cli.config import Tree
from align_cli.errors import Stopped, UserError
from align_cli.judges import Judge

USAGE = "align evaluate calibrate FILE judge=NAME [calibrate.limit=N] [key=value ...]"


def main(argv: Sequence[str]) -> int:
    """`calibrate FILE judge=NAME [key=value ...]`; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        terminal.result(f"{USAGE}\n\n{arguments.explained('calibrate')}")
        return exits.DONE
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise UserError(f"the file of published preferences comes first: {USAGE}")
    file, *rest = argv
    given = arguments.parse([*rest, f"calibrate.path={config.quoted(file)}"])
    if given.show_config:
        given.print_config("calibrate")
        return exits.DONE
    tree = given.compose("calibrate")
    from align_cli.evals import calibrate

    problems = check(tree)
    if problems:
        raise UserError("\n".join(problems))
    judge = config.build(Judge, tree["judge"])
    out = Path(tree["out"]).expanduser()
    try:
        (out / results.FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}; use another folder.") from error
    with exits.terminable():
        try:
            found = calibrate.calibrate(judge, **tree["calibrate"])
        except KeyboardInterrupt:
            raise Stopped("interrupted; what the judge has said is kept") from None
    result = found.result
    told = {"evaluated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "align": __version__}
    finished = results.Finished(
        "calibrate", results.figures_of(result), dict(result.made), result.notes, told, tree, result.items
    )
    results.write(out, finished)
    print_table(
        ["metric", "value [95 %]", "judge"],
        [
            [name, results.shown(figure), f"{result.made['judge']} {result.made['judge_date']}"]
            for name, figure in finished.figures.items()
        ],
    )
    terminal.result("")
    print_table(
        ["model", "win rate as published", f"of {judge.label}", "pairs"],
        [[rate.model, f"{rate.published:.4g}", f"{rate.ours:.4g}", str(rate.pairs)] for rate in found.rates],
    )
    for note in result.notes:
        terminal.result(note)
    terminal.say(f"result in {results.path_of(out, 'calibrate')}")
    return exits.DONE


def check(tree: Tree) -> list[str]:
    """What is wrong with the configuration."""
    from align_cli.evals import calibrate

    known = ("calibrate", "judge", "out")
    problems = [f"{key}: no such key.{config.did_you_mean(key, known)}" for key in tree if key not in known]
    problems += config.check(calibrate.calibrate, tree["calibrate"], "calibrate")
    if tree.get("judge") is None:
        problems.append("judge=null: use a choice of conf/judge, such as judge=local.")
    else:
        problems += config.check(Judge, tree["judge"], "judge")
    if not isinstance(tree.get("out"), str) or not tree["out"]:
        problems.append(f"out={config.shown(tree.get('out'))}: give a folder.")
    return problems
