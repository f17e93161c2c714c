"""`summary.json`: what a run writes into it, and, from its configuration alone, the names of that."""

import math
import re
import resource
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from align_cli import distributed, resources, tilt
from align_cli.columns import GLOSSARY
from align_cli.evaluate import ENOUGH, OF_Z, Graded, flat, graded_figures
from align_cli.experiment import Experiment, producers
from align_cli.method import Method
from align_cli.proposal import UPDATES
from align_cli.references import COUNTERS
from align_cli.rundir import Scalar
from align_cli.sources import FromPolicy
from align_cli.statistics import Interval
from align_cli.train import Progress

MANY = 16  # responses of a prompt, at most, where the configuration does not say how many


def summary(
    progress: Progress,
    after: Mapping[str, float],
    counters: Mapping[str, int | float],
    device: torch.device,
    *,
    sampled: bool,
) -> dict[str, Scalar]:
    """The final figures of a run; every rank calls it.

    Args:
        after: evaluation after the last step.
        counters: of the cached reference and of the proposal, where there are such.
        sampled: whether responses came from the policy.
    """
    peak = max(distributed.gather(_peak_memory(device)))
    told: dict[str, Scalar] = {
        "steps": progress.step,
        "loss/first": progress.first_loss,
        "loss/last": progress.last_loss,
        "groups_per_second": progress.groups / progress.seconds if progress.seconds else math.nan,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else math.nan,
        "peak_memory_gb": peak / 1e9,
    }
    if sampled:
        told["rollout/unrated"] = progress.unrated
    told |= {f"seconds/{name}": value for name, value in progress.spent.items()}
    told |= {f"eval/before/{name}": value for name, value in progress.before.items()}
    told |= {f"eval/after/{name}": value for name, value in after.items()}
    told |= {name: value for name, value in after.items() if name.startswith(("displacement/", "divergence/"))}
    if "lambdas" in progress.columns:
        told |= tilt.summary(progress.columns["lambdas"])
    return {**told, **counters}


def _peak_memory(device: torch.device) -> float:
    """Bytes, at most: of this GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


# --- what it will be called


def names(experiment: Experiment) -> set[str]:
    """The names of the figures that a run can write, asked of the functions that make them; nothing is loaded.

    A run leaves out what is infinite, and what held-out data does not show, such as a fourth response.
    """
    figures = dict.fromkeys(_evaluated(experiment), 0.0)
    sampled = isinstance(experiment.source, FromPolicy)
    work = ("rollout", "score", "train") if sampled else ("train",)
    progress = Progress(spent=dict.fromkeys(work, 0.0), before=figures)
    if experiment.moments is not None:
        per_feature = dict.fromkeys(experiment.moments.features, 0.0)
        fitted = dict.fromkeys(("lambda", "moment", "error"), per_feature)
        progress.columns = {"lambdas": {**fitted, "ess": 0.0, "log_z": 0.0}}
    counters: dict[str, int | float] = {name: 0 for name in COUNTERS if _has_cache(experiment)}
    if experiment.proposal is not None:
        counters[UPDATES] = 0
    return set(summary(progress, figures, counters, torch.device("cpu"), sampled=sampled))


def _has_cache(experiment: Experiment) -> bool:
    return experiment.scalar != "scores" and experiment.reference.name == "cached"


def _evaluated(experiment: Experiment) -> list[str]:
    """What an evaluation tells, before and after."""
    found = _measured(experiment)
    if isinstance(experiment.source, FromPolicy):
        features = [] if experiment.moments is None else list(experiment.moments.features)
        found += _with_bounds("alignment", *(f"moment/{name}" for name in features))
        found += ["unrated", "diversity/self_bleu", *(f"diversity/distinct_{n}" for n in (1, 2, 3))]
        found += [] if experiment.target is None else ["divergence/ess"]
        if experiment.normaliser == "prompt" and experiment.eval.samples < ENOUGH:
            found = [name for name in found if name not in OF_Z]
    else:
        found.append("loss")
    if experiment.world is not None and experiment.scalar != "scores" and experiment.eval.prompts > 0:
        found += graded_figures(
            [Graded(prompt="", sampled=[""], greedy="", rewards=[0.0], right=0.0, right_greedily=False)]
        )
    return found


def _with_bounds(*names: str) -> list[str]:
    return [key for name in names for key in flat(name, Interval(0.0, 0.0, 0.0))]


def _unknown_responses(experiment: Experiment) -> bool:
    """Whether `sizes` has guessed how many responses a prompt has."""
    data = experiment.data
    sampled = isinstance(experiment.source, FromPolicy)
    return not sampled and not data.responses and not experiment.pairwise and "responses" not in (data.expected or {})


def _measured(experiment: Experiment) -> list[str]:
    """The metrics of a batch of one prompt whose columns are made up, in the shapes that the glossary gives."""
    told = MANY if _unknown_responses(experiment) else int(resources.sizes(experiment)["responses"])
    features = 1 if experiment.moments is None else len(experiment.moments.features)
    size = {"B": 1, "K": told, "T": 2, "F": features}
    there = ["ratings", "lengths", "mask", "scores" if experiment.scalar == "scores" else "policy"]
    if isinstance(experiment.source, FromPolicy):
        there += ["behavior", *experiment.evaluated, *(() if experiment.moments is None else ("features",))]
    else:
        there += [*experiment.made, *(("reference",) if _has_cache(experiment) else ())]
    columns: dict[str, Tensor] = {}
    for name in there:
        shape = re.match(r"\(([A-Z, ]+)\)", GLOSSARY[name])
        assert shape is not None, name
        columns[name] = torch.ones([size[letter] for letter in re.findall("[A-Z]", shape[1])])
    return list(Method(experiment, producers(experiment), ()).metrics(columns))
