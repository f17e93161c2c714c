"""The evaluations: each module holds a runner of its own name, which asks a model something and says what came out.

A runner is a function `runner(subject, *, <options>) -> Result`, found by the `name` of a YAML in conf/eval; its
keyword-only parameters are the keys that the YAML holds. Parameters named `judge`, `sandbox` and `training` are given
by the program: from the section `judge`, from the section `code`, and from the sections of training (`Training`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from align_cli.config import Tree

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Item:
    """What was found of one question, prompt or pair: an independent observation.

    Attributes:
        id: names the item in every evaluation of the same data, so that two models can be compared item by item.
        values: its metrics, finite numbers; one that it has no value of is left out.
        shown: what a reader wants to see of it, as JSON holds it: prompt, responses, the right answer, a verdict.
    """

    id: str
    values: Mapping[str, float]
    shown: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What a runner has found.

    Attributes:
        items: in the order of the data; no two have one id. The figure of each of their metrics is the mean over the
            items that have it, with its interval.
        figures: what is no such mean, with the bounds `<name>_low` and `<name>_high` where it has them; one that has
            the name of a metric holds in place of the mean.
        made: how the items came about, in plain values: where the data is and its digest, how many examples are shown,
            template or text, temperature, the version of a grader; the judge as `judge`, and its answers' `date`. What
            is of the model alone does not belong here: models are compared where `made` is the same but for the date.
        notes: sentences on what departs from the usual, and counts of what could not be read.
        counts: of how many items a figure is, where that is not all.
    """

    items: list[Item]
    figures: Mapping[str, float] = field(default_factory=dict)
    made: Mapping[str, Scalar] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """Sections of the configuration of training, as far as the command line names them; {} where it does not.

    They name the data, the algorithm and the scorer of a model that is not a run, and replace a run's own.
    """

    sections: Tree
