"""A recipe: a table or figure of a paper as runs, and what is expected of them (recipes/README.md has the schema)."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align_cli import config, sweep
from align_cli.ranges import NotEmpty
from align_cli.reproduction.claims import Range

SCALES = ("tiny", "paper")
UNKNOWN = "unknown"
OTHER = re.compile(r"<([\w.-]+)>")  # in an override: the directory of another run of the recipe, with the same seed

Trend = Literal["rising", "falling"]


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """One claim, in the schema's words; `wanted` is its `is`: a range, a trend, or None for a number nobody found."""

    claim: NotEmpty
    figure: NotEmpty
    since: NotEmpty | None
    of: NotEmpty | None
    less: NotEmpty | None
    over: list[NotEmpty] | None
    spread: list[NotEmpty] | None
    less_spread: list[NotEmpty] | None
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
        several = (*(self.over or ()), *(self.spread or ()), *(self.less_spread or ()))
        return [name for name in (self.of, self.less, *several) if name is not None]

    @property
    def keys(self) -> list[str]:
        """The figures of a study that it speaks of: `of` and `less` come before the figure's name."""
        return [f"{name}/{self.figure}" for name in self.runs] or [self.figure]

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
        return list(dict.fromkeys(name for override in self.overrides for name in OTHER.findall(override)))

    def placed(self, seed: int, folders: Mapping[str, Path], run_dir: Path) -> list[str]:
        """The arguments of `align train`.

        Args:
            folders: the directories of the runs that it needs.
        """
        told = [_with_folders(override, folders) for override in self.overrides]
        return [*told, f"run.seed={seed}", f"run.dir={config.quoted(str(run_dir))}"]


def _with_folders(override: str, folders: Mapping[str, Path]) -> str:
    if not OTHER.search(override):
        return override
    key, _, value = override.partition("=")
    return f"{key}={config.quoted(OTHER.sub(lambda found: str(folders[found[1]]), value))}"


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

    @property
    def evaluations(self) -> list[str]:
        """The choices of `align evaluate` that are made of each run."""
        return [evaluation(line)[0].removeprefix("eval=") for line in self.evaluate]


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


def merged(overrides: Sequence[str]) -> list[str]:
    """Overrides without those that a later one of the same key replaces."""
    last = {override.partition("=")[0].lstrip("+"): override for override in overrides}
    return list(last.values())


def evaluation(line: str) -> list[str]:
    """The words of `align evaluate` behind the run, of a line such as `mt_bench judge=openai`."""
    choice, _, options = line.strip().partition(" ")
    return [f"eval={choice}", *shlex.split(options)]
