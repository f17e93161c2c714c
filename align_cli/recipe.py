"""Recipes: a table or figure of a paper as runs, and what is expected of them (recipes/README.md has the schema).

Loading a recipe checks the file alone. `composed` composes its runs and holds every expectation against the figures
that they can write.
"""

import fnmatch
import importlib
import json
import re
import shlex
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import yaml

from align_cli import config, paths, sweep
from align_cli.claims import Range
from align_cli.errors import UserError
from align_cli.ranges import Count, NotEmpty

if TYPE_CHECKING:
    from align_cli.experiment import Experiment

SCALES = ("tiny", "paper")
RESULTS = "results.json"  # of a reproduction, in its folder
UNKNOWN = "unknown"
_RUN = re.compile(r"<([\w.-]+)>")  # in an override: the directory of another run of the recipe, with the same seed
_OWN = re.compile(r"[+~]*(run\.(dir|seed)|resume|launch)=")  # what the reproduction sets itself
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

Trend = Literal["rising", "falling"]


# --- what a file may hold


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """One claim, in the schema's words; `wanted` is its `is`: a range, a trend, or None for a number nobody found."""

    claim: NotEmpty
    figure: NotEmpty
    since: NotEmpty | None
    of: NotEmpty | None
    less: NotEmpty | None
    over: list[NotEmpty] | None
    kind: Literal["exact", "paper", "ours"]
    source: NotEmpty
    scale: Literal["tiny", "paper", "both"]
    wanted: Range | Trend | None

    @property
    def figures(self) -> list[str]:
        """The figures that it reads of each run."""
        return [self.figure] if self.since is None else [self.figure, self.since]

    @property
    def runs(self) -> list[str]:
        """The runs that it speaks of."""
        return [name for name in (self.of, self.less, *(self.over or ())) if name is not None]

    def at(self, scale: str) -> bool:
        """Whether it is expected at this scale."""
        return self.scale in (scale, "both")

    @property
    def expected(self) -> str:
        """What is expected, in short."""
        if self.wanted is None or isinstance(self.wanted, str):
            return self.wanted or UNKNOWN
        low, high = self.wanted.low, self.wanted.high
        if low == float("-inf"):
            return f"< {high:g}"
        if high == float("inf"):
            return f"> {low:g}"
        return f"{low:g} to {high:g}" if low < high else f"{low:g}"


@dataclass(frozen=True, kw_only=True)
class _Equal:
    value: float
    tolerance: float


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


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Curves of `metrics.jsonl`: each of `y` over `x`, by run."""

    x: NotEmpty
    y: list[NotEmpty]
    by: Literal["run"]


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Figures of the runs, a bar for each with its interval; `runs` names which, without it all."""

    y: list[NotEmpty]
    runs: list[NotEmpty] | None


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """One figure of the runs against another, a point for each."""

    x: NotEmpty
    y: NotEmpty
    runs: list[NotEmpty] | None


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A figure over two swept keys."""

    x: NotEmpty
    y: NotEmpty
    figure: NotEmpty
    runs: list[NotEmpty] | None


Drawing = Lines | Bars | Scatter | Heat
DRAWINGS: dict[str, type[Drawing]] = {"lines": Lines, "bars": Bars, "scatter": Scatter, "heat": Heat}


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """Points of the paper's own figure: the axes' names and, for each series, its (x, y)."""

    x: NotEmpty
    y: NotEmpty
    series: dict[str, list[list[float]]]
    source: NotEmpty


@dataclass(frozen=True, kw_only=True)
class _File:
    title: NotEmpty
    paper: NotEmpty
    departures: list[NotEmpty] | None
    scales: dict[str, Any]
    expect: list[Any]
    draw: list[Any] | None
    paper_figure: dict[str, Any] | None


# --- what it means


@dataclass(frozen=True)
class Run:
    """A run: its overrides without seed and directory, and the values that are swept."""

    name: str
    overrides: tuple[str, ...]
    swept: tuple[str, ...]

    @property
    def folder(self) -> str:
        """A folder's name."""
        return sweep.folder_name((self.name.replace("[", ",").removesuffix("]"),))

    @property
    def needs(self) -> list[str]:
        """The runs whose directories it reads."""
        return list(dict.fromkeys(name for override in self.overrides for name in _RUN.findall(override)))

    def placed(self, seed: int, folders: Mapping[str, Path], run_dir: Path) -> list[str]:
        """The arguments of `align train`.

        Args:
            folders: the directories of the runs that it needs.
        """
        told = [_with_folders(override, folders) for override in self.overrides]
        return [*told, f"run.seed={seed}", f"run.dir={config.quoted(str(run_dir))}"]


def _with_folders(override: str, folders: Mapping[str, Path]) -> str:
    if not _RUN.search(override):
        return override
    key, _, value = override.partition("=")
    return f"{key}={config.quoted(_RUN.sub(lambda found: str(folders[found[1]]), value))}"


@dataclass(frozen=True)
class Study:
    """A function of the seed in `align_cli.studies` and its options; its figures are those of the recipe."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """A recipe at one scale: runs or a study, seeds, and what is evaluated after training.

    Attributes:
        evaluate: a line for each evaluation, its choice and options: `mt_bench judge=openai`.
    """

    name: str
    cost: str
    seeds: int
    runs: tuple[Run, ...]
    study: Study | None
    evaluate: tuple[str, ...]
    departures: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A table or figure of a paper."""

    name: str
    path: Path
    title: str
    paper: str
    scales: dict[str, Scale]
    expect: tuple[Expectation, ...]
    draw: tuple[Drawing, ...]
    paper_figure: PaperFigure | None


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


def results(path: Path) -> dict[str, Any] | None:
    """The results of an earlier reproduction; None where there are none.

    Raises:
        UserError: they cannot be read.
    """
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); removed, `align reproduce` makes it again.") from error
    if not isinstance(told, dict) or "expectations" not in told:
        raise UserError(f"{path} holds no results of a reproduction; use another folder.")
    return told


# --- loading


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
        combinations, swept = sweep.expand([_RUN.sub(r"__\1__", each) for each in merged([*common, *own])])
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
    for name in dict.fromkeys(name for each in given for name in _RUN.findall(each)):
        override = override.replace(f"__{name}__", f"<{name}>")
    return override


def merged(overrides: Sequence[str]) -> list[str]:
    """Overrides without those that a later one of the same key replaces."""
    last = {override.partition("=")[0].lstrip("+"): override for override in overrides}
    return list(last.values())


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


def evaluation(line: str) -> list[str]:
    """The words of `align evaluate` behind the run, of a line such as `mt_bench judge=openai`."""
    choice, _, options = line.strip().partition(" ")
    return [f"eval={choice}", *shlex.split(options)]


def evaluations(scale: Scale) -> list[str]:
    """The choices of `align evaluate` that are made of each run."""
    return [evaluation(line)[0].removeprefix("eval=") for line in scale.evaluate]


# --- expectations and drawings

_SHOWN = "below: NUMBER, above: NUMBER, within: [LOW, HIGH], equal: {value: NUMBER, tolerance: NUMBER}, equal: unknown"


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


# --- composing


def composed(recipe: Recipe, scale: str, config_dirs: Sequence[str] = ()) -> "dict[str, Experiment]":
    """The experiment of each run, without its seed and directory; every expectation is one that they can meet.

    Raises:
        UserError: all that is wrong, a sentence with file and run for each problem.
    """
    found = experiments(recipe, scale, config_dirs)
    problems = _unwritten(recipe, recipe.scales[scale], found)
    if problems:
        raise UserError("\n".join(f"{recipe.path}: {problem}" for problem in problems))
    return found


def experiments(recipe: Recipe, scale: str, config_dirs: Sequence[str] = ()) -> "dict[str, Experiment]":
    """The experiment of each run, whatever is expected of it.

    Raises:
        UserError: a run is wrong, a sentence with file and run for each problem.
    """
    from align_cli import reading  # here, so that recipes are listed without it

    found: dict[str, Experiment] = {}
    problems: list[str] = []
    for run in recipe.scales[scale].runs:
        folders = {name: Path(name) for name in run.needs}
        try:
            tree = config.compose("train", run.placed(0, folders, Path("unused", run.folder)), config_dirs)
            found[run.name] = reading.read(tree, planned=True)
        except UserError as error:
            problems += [f"{recipe.path}: scales.{scale}.runs.{run.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(problems))
    return found


def _unwritten(recipe: Recipe, scale: Scale, found: "Mapping[str, Experiment]") -> list[str]:
    """Expectations of figures that nobody writes, or of a study that is not there."""
    from align_cli import summaries

    if scale.study is not None:
        return _not_in_study(recipe, scale.study, scale.name)
    written = {name: [*summaries.names(each), *_of_evaluations(scale)] for name, each in found.items()}
    return [
        f"expect[{place}]: {figure}: {run} writes no such figure at scale {scale.name}."
        f"{config.did_you_mean(figure, written[run])}"
        for place, each in enumerate(recipe.expect)
        if each.at(scale.name)
        for run in each.runs
        for figure in each.figures
        if not _among(figure, written[run])
    ]


def _among(figure: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(figure, pattern) for pattern in patterns)


def _of_evaluations(scale: Scale) -> list[str]:
    return [f"eval/{choice}/*" for choice in evaluations(scale)]


def keys(expectation: Expectation) -> list[str]:
    """The figures of a study that an expectation speaks of: `of` and `less` come before the figure's name."""
    return [f"{name}/{expectation.figure}" for name in expectation.runs] or [expectation.figure]


def _not_in_study(recipe: Recipe, study: Study, scale: str) -> list[str]:
    where = f"scales.{scale}"
    try:
        function = config.find("align_cli.studies", study.name, where, told="study")
    except UserError as error:
        return [str(error)]
    there = list(vars(importlib.import_module(function.__module__))["FIGURES"])
    return config.check(function, study.options, f"{where}.options") + [
        f"expect[{place}].figure: study={study.name} gives no {key}.{config.did_you_mean(key, there)} "
        f"It gives {', '.join(there)}."
        for place, each in enumerate(recipe.expect)
        if each.at(scale)
        for key in keys(each)
        if not _among(key, there)
    ]
