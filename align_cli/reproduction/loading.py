"""From a recipe's file to the recipe: found by its name, read, and all that is wrong with it said at once.

The file alone is checked here; whether its runs can be composed is `align_cli.reproduction.composing`'s to find out.
"""

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from align_cli import config, paths, sweep
from align_cli.errors import UserError
from align_cli.ranges import Count, NotEmpty
from align_cli.reproduction.claims import Range
from align_cli.reproduction.recipe import (
    DRAWINGS,
    OTHER,
    SCALES,
    UNKNOWN,
    Drawing,
    Expectation,
    Lines,
    PaperFigure,
    Recipe,
    Run,
    Scale,
    Study,
    Trend,
    evaluation,
    merged,
)

_OWN = re.compile(r"[+~]*(run\.(dir|seed)|resume|launch)=")  # what the reproduction sets itself
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


# --- finding


def names() -> dict[str, Path]:
    """The recipes that ship with the package, `nca/figure5` -> its file."""
    home = paths.recipes()
    return {path.relative_to(home).with_suffix("").as_posix(): path for path in sorted(home.rglob("*.yaml"))}


def find(name: str) -> tuple[str, Path]:
    """The recipe that a name or a file of one's own means.

    Raises:
        UserError: there is none.
    """
    there = names()
    wanted = name.removeprefix("recipes/")
    if wanted in there:
        return wanted, there[wanted]
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: there is no such file. `align cp nca/NAME {name}` makes one of a recipe.")
        return path.stem, path
    near = config.did_you_mean(wanted, list(there))
    raise UserError(f"{name}: there is no such recipe.{near} `align ls recipes` lists them.")


def title(path: Path) -> str:
    """What a recipe calls itself; the reason where its file cannot be read."""
    try:
        told = _read(path).get("title")
    except UserError as error:
        return str(error)
    return str(told or "no title")


class _Loader(yaml.SafeLoader):
    """YAML of plain values in which no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if str(key) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key}", key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(node, dict):
        raise UserError(f"{path}: {type(node).__name__} is not a recipe; give title, paper, scales and expect.")
    return node


# --- a file


@dataclass(frozen=True, kw_only=True)
class _File:
    title: NotEmpty
    paper: NotEmpty
    departures: list[NotEmpty] | None
    scales: dict[str, Any]
    expect: list[Any]
    draw: list[Any] | None
    paper_figure: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """A scale as it stands in the file."""

    cost: NotEmpty
    seeds: Count
    common: list[NotEmpty] | None
    runs: dict[str, Any] | None
    study: NotEmpty | None
    options: dict[str, Any] | None
    evaluate: list[NotEmpty] | None
    departures: list[NotEmpty] | None


def load(name: str) -> Recipe:
    """A recipe, its file checked; its runs are not composed yet.

    Raises:
        UserError: all that is wrong with the file, a sentence with file and key for each problem.
    """
    name, path = find(name)
    node = _read(path)
    problems: list[str] = []
    _checked(_File, node, "", problems)
    known = {key: value for key, value in node.items() if key in config.options(_File)}
    file: _File | None = _checked(_File, known, "", [])  # an unknown key does not hide what else is wrong
    scales: dict[str, Scale] = {}
    expect: list[Expectation] = []
    draw: list[Drawing] = []
    figure: PaperFigure | None = None
    if file is not None:
        for scale in [*SCALES, *(key for key in file.scales if key not in SCALES)]:
            found = _scale(scale, file.scales, file.departures or [], problems)
            scales |= {} if found is None else {scale: found}
        for place, each in enumerate(file.expect):
            expect += _expectation(each, f"expect[{place}]", scales, problems)
        if not file.expect:
            problems.append("expect=[]: a recipe claims something.")
        for place, each in enumerate(file.draw or []):
            draw += _drawing(each, f"draw[{place}]", scales, problems)
        if file.paper_figure is not None:
            figure = _checked(PaperFigure, file.paper_figure, "paper_figure", problems)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    assert file is not None
    return Recipe(name, path, file.title, file.paper, scales, tuple(expect), tuple(draw), figure)


def _checked(target: Any, node: Any, where: str, problems: list[str], **injected: Any) -> Any:
    """`target` with the keys of a node, those that may be absent as None; None where something is wrong."""
    if not isinstance(node, Mapping):
        problems.append(f"{where}={config.shown(node)}: give a section with keys.")
        return None
    hints = typing.get_type_hints(target)
    free = {name: None for name in config.options(target) if name not in injected and _may_be_none(hints[name])}
    found = config.check(target, {**free, **node}, where, injected=list(injected))
    problems += [problem.removeprefix(".") for problem in found]
    return None if found else target(**{**free, **node}, **injected)


def _may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _scale(name: str, given: Mapping[str, Any], shared: Sequence[str], problems: list[str]) -> Scale | None:
    where = f"scales.{name}"
    if name not in SCALES:
        problems.append(f"{where}: no such scale.{config.did_you_mean(name, SCALES)} There are {', '.join(SCALES)}.")
        return None
    if name not in given:
        problems.append(f"{where} is missing.")
        return None
    before = len(problems)
    found: _Scale | None = _checked(_Scale, given[name], where, problems)
    if found is None:
        return None
    if (found.runs is None) == (found.study is None):
        problems.append(f"{where}: give either runs or a study.")
    if found.study is not None and (found.common or found.evaluate):
        problems.append(f"{where}: common and evaluate are of runs; a study takes options.")
    if found.study is None and found.options is not None:
        problems.append(f"{where}.options: they are of a study; runs have overrides.")
    runs: list[Run] = []
    for run, overrides in (found.runs or {}).items():
        runs += _expanded(str(run), overrides, found.common or [], f"{where}.runs.{run}", problems)
    if found.runs is not None and not found.runs:
        problems.append(f"{where}.runs: give at least one run.")
    problems += _circles(runs, where)
    problems += _unknown_choices(found.evaluate or [], where)
    study = None if found.study is None else Study(found.study, found.options or {})
    departures = (*shared, *(found.departures or ()))
    if len(problems) > before:
        return None
    return Scale(name, found.cost, found.seeds, tuple(runs), study, tuple(found.evaluate or ()), departures)


def _expanded(name: str, given: Any, common: Sequence[str], where: str, problems: list[str]) -> list[Run]:
    """The run of a name, or the runs of a sweep."""
    sweeps = isinstance(given, Mapping) and set(given) == {"sweep"}
    own = given["sweep"] if sweeps else given
    if not isinstance(own, list) or not all(isinstance(each, str) for each in own):
        commas = " A comma parts the items of a list, so that values with commas need quotes." if own else ""
        told = "give a list of overrides, or {sweep: [...]}"
        problems.append(f"{where}={config.shown(given)}: {told}.{commas}")
        return []
    if not _NAME.fullmatch(name):
        problems.append(f"{where}: use letters, digits, dots, dashes and underscores in a run's name.")
        return []
    for override in (*common, *own):
        if _OWN.match(override):
            problems.append(f"{where}: {override}: align reproduce sets it, for each seed.")
            return []
    try:
        # a text in angle brackets is not a value of Hydra's grammar; it is put back below
        combinations, swept = sweep.expand([OTHER.sub(r"__\1__", each) for each in merged([*common, *own])])
    except UserError as error:
        problems += [f"{where}: {line}" for line in str(error).splitlines()]
        return []
    if swept and not sweeps:
        problems.append(f"{where}: several values need {{sweep: [...]}}, or quotes in quotes: \"key='a,b'\".")
        return []
    whole = [[_back(each, [*common, *own]) for each in combination] for combination in combinations]
    varying = [place for place in range(len(whole[0])) if len({each[place] for each in whole}) > 1]
    found: list[Run] = []
    for combination in whole:
        values = tuple(combination[place] for place in varying)
        told = f"{name}[{','.join(values)}]" if values else name
        found.append(Run(told, tuple(combination), values))
    return found


def _back(override: str, given: Sequence[str]) -> str:
    """An override with the names of runs in angle brackets again."""
    for name in dict.fromkeys(name for each in given for name in OTHER.findall(each)):
        override = override.replace(f"__{name}__", f"<{name}>")
    return override


def _circles(runs: Sequence[Run], where: str) -> list[str]:
    """Runs that need one that is not there, or that waits for them."""
    needs = {run.name: run.needs for run in runs}
    problems = [
        f"{where}.runs.{name}: <{other}>: there is no such run.{config.did_you_mean(other, list(needs))}"
        for name, others in needs.items()
        for other in others
        if other not in needs
    ]

    def reaches(start: str, goal: str, seen: frozenset[str]) -> bool:
        return any(
            other == goal or (other not in seen and reaches(other, goal, seen | {other}))
            for other in needs.get(start, ())
        )

    return problems + [
        f"{where}.runs.{name}: it waits for itself." for name in needs if reaches(name, name, frozenset())
    ]


def _unknown_choices(chosen: Sequence[str], where: str) -> list[str]:
    there = config.group_names().get("eval", [])
    names = [evaluation(line)[0].removeprefix("eval=") for line in chosen]
    return [
        f"{where}.evaluate: {name}: no such evaluation.{config.did_you_mean(name, there)} There are {', '.join(there)}."
        for name in names
        if name not in there
    ] + [f"{where}.evaluate: {name}: name it once." for name in set(names) if names.count(name) > 1]


# --- expectations and drawings

_SHOWN = "below: NUMBER, above: NUMBER, within: [LOW, HIGH], equal: {value: NUMBER, tolerance: NUMBER}, equal: unknown"


@dataclass(frozen=True, kw_only=True)
class _Equal:
    value: float
    tolerance: float


def _expectation(node: Any, where: str, scales: Mapping[str, Scale], problems: list[str]) -> Iterator[Expectation]:
    if not isinstance(node, Mapping):
        problems.append(f"{where}={config.shown(node)}: give a section with keys.")
        return
    if "is" not in node:
        problems.append(f"{where}.is is missing: {_SHOWN}, rising or falling.")
        return
    before = len(problems)
    wanted = _wanted(node["is"], f"{where}.is", problems)
    rest = {key: value for key, value in node.items() if key != "is"}
    found: Expectation | None = _checked(Expectation, rest, where, problems, wanted=wanted)
    if found is None or len(problems) > before:
        return
    trend = isinstance(found.wanted, str)
    if trend != (found.over is not None):
        problems.append(f"{where}: over: [RUN, ...] and is: rising or falling belong together.")
    if found.over is not None and (found.of or found.less or len(found.over) < 2):
        problems.append(f"{where}.over: give two or more runs, without of and less.")
    if found.spread is not None and (found.of or found.less or found.over or len(found.spread) < 2):
        problems.append(f"{where}.spread: give two or more runs, without of, less and over.")
    if found.less_spread is not None and (found.spread is None or len(found.less_spread) < 2):
        problems.append(f"{where}.less_spread: give two or more runs, and those that they are held against as spread.")
    if found.since is not None and any(s.study is not None for name, s in scales.items() if found.at(name)):
        problems.append(f"{where}.since: it is of runs; a study gives the figure that is meant.")
    if found.less is not None and found.of is None:
        problems.append(f"{where}.less: of which run it is taken, of: RUN says.")
    if trend and found.kind == "exact":
        problems.append(f"{where}.kind: a trend over runs is measured; use paper or ours.")
    for name in SCALES:
        if found.at(name) and name in scales:
            problems += _unknown_runs(found, scales[name], where)
    if len(problems) == before:
        yield found


def _unknown_runs(found: Expectation, scale: Scale, where: str) -> list[str]:
    if scale.study is not None:
        return []
    there = [run.name for run in scale.runs]
    if not found.runs:
        return [f"{where}.of: which run it is expected of; at scale {scale.name} there are {', '.join(there)}."]
    return [
        f"{where}: {name}: no such run at scale {scale.name}.{config.did_you_mean(name, there)} "
        f"There are {', '.join(there)}."
        for name in found.runs
        if name not in there
    ]


def _wanted(node: Any, where: str, problems: list[str]) -> Range | Trend | None:
    if node in ("rising", "falling"):
        return node
    key, value = next(iter(node.items())) if isinstance(node, Mapping) and len(node) == 1 else (None, None)
    if key == "equal" and value == UNKNOWN:
        return None
    if key == "equal" and isinstance(value, Mapping):
        found = _checked(_Equal, value, f"{where}.equal", problems)
        if found is not None and found.tolerance < 0:
            problems.append(f"{where}.equal.tolerance={found.tolerance}: use 0 or more.")
        return None if found is None else Range(found.value - found.tolerance, found.value + found.tolerance, False)
    if key in ("below", "above") and _is_number(value):
        bound = float(value)
        return Range(float("-inf"), bound, True) if key == "below" else Range(bound, float("inf"), True)
    if key == "within" and isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
        low, high = value
        if low > high:
            problems.append(f"{where}.within={value}: it is upside down; use [{high}, {low}].")
        return Range(low, high, False)
    problems.append(f"{where}={config.shown(node)}: use {_SHOWN}, rising or falling.")
    return None


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _drawing(node: Any, where: str, scales: Mapping[str, Scale], problems: list[str]) -> list[Drawing]:
    if not isinstance(node, Mapping) or len(node) != 1 or next(iter(node)) not in DRAWINGS:
        told = ", ".join(f"{{{name}: {{...}}}}" for name in DRAWINGS)
        problems.append(f"{where}={config.shown(node)}: use one of {told}.")
        return []
    ((kind, options),) = node.items()
    found: Drawing | None = _checked(DRAWINGS[kind], options, f"{where}.{kind}", problems)
    if found is None:
        return []
    there = [run.name for scale in scales.values() for run in scale.runs]
    named = [] if isinstance(found, Lines) else found.runs or []
    problems += [
        f"{where}.{kind}.runs: {name}: no such run at any scale.{config.did_you_mean(name, there)}"
        for name in named
        if name not in there and len(scales) == len(SCALES)
    ]
    return [found]
