"""`align evaluate`: ask a run or a model something, and say what came out, with intervals and how it was made."""

import datetime
import hashlib
import inspect
import shlex
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

import align_cli
from align_cli import config, exits, judges, paths, results, rundir, terminal
from align_cli.commands import arguments, calibrate
from align_cli.commands.arguments import Arguments
from align_cli.commands.listing import print_table
from align_cli.config import Tree
from align_cli.errors import RunError, Stopped, UserError
from align_cli.evals import Result, Training
from align_cli.judges import Judge
from align_cli.results import SETTINGS, TRAINING, Finished
from align_cli.sandbox import Code, opened

USAGE = "align evaluate RUN_OR_MODEL eval=NAME,... [key=value ...]"
INJECTED = ("judge", "sandbox", "training")  # parameters of a runner that the program gives


@dataclass(frozen=True)
class Planned:
    """An evaluation that is to be made.

    Attributes:
        name: the choice of conf/eval, and the file of its results.
        tree: its configuration.
        runner: what makes it.
    """

    name: str
    tree: Tree
    runner: Callable[..., Result]


def main(argv: list[str]) -> int:
    """`evaluate RUN_OR_MODEL eval=NAME,... [key=value ...]`; returns the exit code."""
    if argv[:1] == ["calibrate"]:
        return calibrate.main(argv[1:])
    if not argv or {"-h", "--help"} & set(argv):
        lists = "align ls eval lists what there is, align ls suite the lists of them, align show eval/NAME its options."
        terminal.result(f"{USAGE}\n{calibrate.USAGE}\n\n{lists}\n\n{arguments.explained('evaluate')}")
        return exits.DONE if argv else exits.USER
    target, *rest = argv
    if target.startswith("-") or ("=" in target and not Path(target).exists()):
        raise UserError(f"{target}: the run or model comes first: {USAGE}")
    named, given = read(rest)
    planned = plan(named, given)
    tree = planned[0].tree
    if given.show_config:
        for each in planned:
            arguments.print_tree({each.name: each.tree})
        return exits.DONE
    from align_cli.launch import refuse_foreign_ranks

    refuse_foreign_ranks("evaluate")
    from align_cli import cache, subject

    options = config.build(subject.Generate, tree["generate"])
    with exits.terminable(), cache.in_use(paths.cache()):
        asked = subject.find(target, options)
        out = place(tree["out"], asked)
        return run_all(planned, asked, out)


# --- what is asked


def read(argv: Sequence[str]) -> tuple[list[str], Arguments]:
    """The words of the command line that name evaluations, and the other ones.

    Raises:
        UserError: words that are none of a command line.
    """
    named = [word for word in argv if word.startswith(("eval=", "suite="))]
    return named, arguments.parse([word for word in argv if word not in named])


def plan(named: Sequence[str], given: Arguments) -> list[Planned]:
    """The evaluations that a command line names, each composed and checked; nothing is loaded.

    Raises:
        UserError: all that is wrong with them.
    """
    if given.multirun:
        raise UserError("-m, --multirun: several evaluations are eval=NAME,NAME; one value for each key.")
    lists = [[f"eval={name}"] for name in _words(named, "eval=")]
    lists += [line for name in _words(named, "suite=") for line in suite(name, given.config_dirs)]
    problems: list[str] = []
    found: list[Planned] = []
    for line in lists or [[]]:
        # an option of one of several is not the others'
        own = [word for word in given.overrides if len(lists) < 2 or not word.startswith("eval.")]
        later = [word for word in given.overrides if word not in own]
        try:
            found.append(composed([*line, *own], later, given.config_dirs))
        except UserError as error:
            problems += str(error).splitlines()
    for word in given.overrides if len(lists) > 1 else ():
        key = word.partition("=")[0].removeprefix("eval.")
        if word.startswith("eval.") and not problems and not any(key in config.options(e.runner) for e in found):
            near = config.did_you_mean(key, [name for e in found for name in config.options(e.runner)])
            problems.append(f"{word}: none of these evaluations has such an option.{near}")
    repeated = [each.name for place, each in enumerate(found) if each.name in [e.name for e in found[:place]]]
    if repeated:
        problems.append(f"eval={repeated[0]}: named twice; each evaluation has one file of results.")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return found


def _words(named: Sequence[str], key: str) -> list[str]:
    """The names that `key` is given, in order.

    Raises:
        UserError: an empty one.
    """
    found = [name for word in named if word.startswith(key) for name in word.removeprefix(key).split(",")]
    if "" in found:
        raise UserError(f"{key}: give a name; align ls {key.rstrip('=')} lists them.")
    return found


def suite(name: str, config_dirs: Sequence[str]) -> list[list[str]]:
    """The overrides of each evaluation of a suite.

    Raises:
        UserError: there is no such suite, or it is not a list of evaluations.
    """
    choices = config.group_names(config_dirs).get("suite", [])
    if name not in choices:
        near = config.did_you_mean(name, choices)
        raise UserError(f"suite={name}: no such choice.{near} suite can be {', '.join(choices)}.")
    files = [Path(root) / "suite" / f"{name}.yaml" for root in (paths.conf(), *config_dirs)]
    path = next(file for file in files if file.is_file())
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    lines = tree.get("evals") if isinstance(tree, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, str) and line.startswith("eval=") for line in lines):
        raise UserError(f"{path}: write a list `evals` with lines such as 'eval=gsm8k eval.shots=8'.")
    return [shlex.split(line) for line in lines]


def composed(overrides: Sequence[str], later: Sequence[str], config_dirs: Sequence[str]) -> Planned:
    """One evaluation, checked.

    Args:
        later: overrides of options that it may not have.

    Raises:
        UserError: what is wrong with it.
    """
    tree = config.compose("evaluate", overrides, config_dirs)
    section = tree.get("eval")
    if not isinstance(section, Mapping) or "name" not in section:
        told = "eval=NAME,... or suite=NAME has to be given; align ls eval and align ls suite list them."
        raise UserError("\n".join([*unknown(tree), told]))
    runner = config.find("align_cli.evals", section["name"], "eval")
    own = [word for word in later if word.partition("=")[0].removeprefix("eval.") in config.options(runner)]
    if own:
        tree = config.compose("evaluate", [*overrides, *own], config_dirs)
    problems = check(tree, runner)
    if problems:
        raise UserError("\n".join(problems))
    words = [word.removeprefix("eval=") for word in overrides if word.startswith("eval=")]
    return Planned(words[-1], tree, runner)


def check(tree: Tree, runner: Callable[..., Result]) -> list[str]:
    """What is wrong with the configuration of an evaluation."""
    from align_cli.subject import Generate

    problems = unknown(tree)
    problems += config.check(Generate, tree["generate"], "generate")
    options = {key: value for key, value in tree["eval"].items() if key != "name"}
    taken = config.options(runner)
    problems += config.check(runner, options, "eval", injected=INJECTED)
    problems += config.check(Code, tree["code"], "code")
    if tree.get("judge") is not None:
        problems += config.check(Judge, tree["judge"], "judge")
    if _asks_judge(runner) and tree.get("judge") is None:
        problems.append(
            f"eval={tree['eval']['name']} asks a judge, and none is named; use judge=openai judge.model=MODEL, for any "
            "endpoint of that kind."
        )
    if "training" not in taken:
        surplus = [key for key in TRAINING if tree.get(key) is not None]
        problems += [f"{key}: eval={tree['eval']['name']} does not look at it." for key in surplus]
    if not isinstance(tree.get("again"), bool):
        problems.append(f"again={config.shown(tree.get('again'))}: use true or false.")
    if tree.get("out") is not None and (not isinstance(tree["out"], str) or not tree["out"]):
        problems.append(f"out={config.shown(tree['out'])}: give a folder.")
    return problems


def unknown(tree: Tree) -> list[str]:
    """A sentence for each key that an evaluation does not have."""
    known = ("eval", "judge", "generate", "code", "out", "again", *TRAINING)
    return [f"{key}: no such key.{config.did_you_mean(key, known)}" for key in tree if key not in known]


def _asks_judge(runner: Callable[..., Result]) -> bool:
    """Whether a runner cannot do without a judge."""
    hint = get_type_hints(runner).get("judge")
    return hint is not None and types.NoneType not in get_args(hint)


# --- what is done


def place(out: str | None, asked: Any) -> Path:
    """The folder of the results.

    Raises:
        UserError: it cannot be written.
    """
    slug = asked.name.strip("/").replace("/", "--").lstrip(".") or "model"
    folder = Path(out).expanduser() if out is not None else asked.run or Path("evaluations") / slug
    own = asked.run is not None and folder.resolve() == asked.run.resolve()
    if not own and (folder / rundir.CONFIG).is_file():
        # its summary would make an unfinished run a finished one
        raise UserError(f"out={folder} holds a run, of which this evaluation is not; choose another folder.")
    try:
        (folder / results.FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; out=FOLDER chooses another.") from error
    return folder


def run_all(planned: Sequence[Planned], asked: Any, out: Path) -> int:
    """Make the evaluations one after another, write them, print the table; one that fails does not stop the others.

    Raises:
        Stopped: by a signal; what was generated is kept.
        UserError, RunError: what was wrong with those that failed.
    """
    done: list[Finished] = []
    new: list[Finished] = []
    failed: list[tuple[str, UserError | RunError]] = []
    for each in planned:
        try:
            options = fingerprint(each, asked)
            there = None if each.tree["again"] else kept(results.path_of(out, each.name), options)
            if there is None:
                there = made(each, asked, out, options)
                new.append(there)
            done.append(there)
        except KeyboardInterrupt:
            raise Stopped(f"interrupted in eval={each.name}; what was generated is kept") from None
        except (UserError, RunError) as error:
            failed.append((each.name, error))
    if done:
        show(done)
        terminal.say(f"results in {out / results.FOLDER}")
    if new and asked.run == out:
        track(new, asked.run, asked.config)
    if failed:
        told = "\n".join(f"eval={name}: {line}" for name, error in failed for line in str(error).splitlines())
        raise UserError(told) if all(isinstance(error, UserError) for _, error in failed) else RunError(told)
    return exits.DONE


def track(new: Sequence[Finished], run: Path, tree: Tree) -> None:
    """Add what was found to the run's W&B run, where it has one."""
    from align_cli import tracking

    figures = {name: value for each in new for name, value in results.flat(each).items()}
    tables = {f"{results.FOLDER}/{each.name}/items": results.sample_of(each) for each in new if each.items}
    tracking.add(run, tree, figures, tables)


def kept(path: Path, options: dict[str, Any]) -> Finished | None:
    """The evaluation in a file, if it is the very one that is asked for."""
    there = results.read(path) if path.is_file() else None
    if there is None or there.options != options:
        return None
    terminal.say(f"eval={there.name} is there already; again=true makes it again")
    return there


def made(planned: Planned, asked: Any, out: Path, options: dict[str, Any]) -> Finished:
    """Make an evaluation and write it.

    Raises:
        UserError: it cannot be made of this subject, or nothing came out.
    """
    terminal.say(f"eval={planned.name}")
    own = {key: value for key, value in planned.tree["eval"].items() if key != "name"}
    result = planned.runner(asked, **own, **parts(planned))
    if not result.items and not result.figures:
        raise UserError(f"nothing was measured. {' '.join(result.notes)}")
    finished = Finished(
        name=planned.name,
        figures=results.figures_of(result),
        made={"seed": asked.options.seed, "numerics": asked.numerics, **result.made},
        notes=result.notes,
        subject={
            "name": asked.name,
            "weights": asked.digest,
            "align": align_cli.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        options=options,
        items=result.items,
    )
    results.write(out, finished)
    return finished


def parts(planned: Planned) -> dict[str, Any]:
    """What the program gives to a runner."""
    tree = planned.tree
    found: dict[str, Any] = {}
    if "judge" in config.options(planned.runner):
        found["judge"] = None if tree.get("judge") is None else config.build(Judge, tree["judge"])
    if "sandbox" in config.options(planned.runner):
        found["sandbox"] = opened(config.build(Code, tree["code"]))
    if "training" in config.options(planned.runner):
        found["training"] = Training({key: tree[key] for key in TRAINING if tree.get(key) is not None})
    return found


def fingerprint(planned: Planned, asked: Any) -> dict[str, Any]:
    """What an evaluation follows from: its options, the weights, the runner's code, local files that it reads."""
    code = hashlib.blake2b(digest_size=8)
    for source in sorted(Path(inspect.getfile(inspect.unwrap(planned.runner))).parent.glob("*.py")):
        code.update(source.read_bytes())
    sections = [tree.get(name) for tree in (planned.tree, asked.config or {}) for name in ("data", "scorer")]
    given = [section.get(key) for section in sections if section is not None for key in ("path", "paths")]
    values = [*planned.tree["eval"].values(), *chain.from_iterable(e if isinstance(e, list) else [e] for e in given)]
    judge = planned.tree.get("judge")
    return {
        "eval": planned.tree["eval"],
        **{name: planned.tree.get(name) for name in SETTINGS},
        **({} if judge is None else {"judge": judges.asked_for(judge)}),
        "weights": asked.digest,
        "writing": asked.writing,
        "made_by": code.hexdigest(),
        "files": [_files(path) for value in values if (path := _there(value)) is not None],
    }


def _there(value: Any) -> Path | None:
    """The file or folder that an option names, if it is one: a prompt is an option, too."""
    try:
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        return path if path is not None and path.exists() else None
    except (OSError, RuntimeError):  # too long for a name; nobody's home
        return None


def _files(path: Path) -> list[list[Any]]:
    """Names, sizes and times of a file, or of the files of a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


# --- what is printed


def show(done: Sequence[Finished]) -> None:
    """A table of the figures, then what is to be said of them."""
    print_table(results.HEADINGS, [row for each in done for row in results.rows_of(each)])
    for each in done:
        for note in each.notes:
            terminal.result(f"{each.name}: {note}")
