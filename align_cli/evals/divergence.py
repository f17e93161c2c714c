"""How far a model has moved from the one that it started from, and how far it is from the target of its run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align_cli import metrics
from align_cli.assembly import online
from align_cli.checkpoints import committed
from align_cli.data.store import Group
from align_cli.errors import UserError
from align_cli.evals import Item, Result, Training, prompts
from align_cli.evals.prompts import Drawn, HeldOut
from align_cli.evaluate import ENOUGH, OF_Z, figures_of_each, measured_parts
from align_cli.experiment import Experiment, producers
from align_cli.method import Method
from align_cli.normaliser import LogZ
from align_cli.ranges import Count, NotEmpty
from align_cli.raters import ByProgram
from align_cli.references import Frozen
from align_cli.subject import Subject

# The metrics of samples that a target has, and what they are called here.
OF_A_TARGET = {"divergence/": "target/", "rollout/moment/": "moment/"}
OF_ALL = ("divergence/log_z", "divergence/skipped")  # of all prompts together


def divergence(
    subject: Subject,
    *,
    training: Training,
    limit: Count | None,
    samples: Count,
    max_new_tokens: Count,
    reference: NotEmpty | None,
) -> Result:
    """KL both ways and entropy, nats of a response, from samples of either model; for f-DPG also to its target.

    `kl` is KL(subject ‖ reference), `kl_from_reference` KL(reference ‖ subject). Both are of the distributions that are
    sampled, responses cut at `max_new_tokens`, at temperature 1.

    Args:
        limit: at most so many held-out prompts.
        samples: responses of each model to each prompt.
        max_new_tokens: longest response; fewer where the model's positions leave less.
        reference: a run or model; None: the model that the run started from, or has named, of which its target is
            made, too.
    """
    asked = prompts.held_out(subject, training, limit=limit, responses=False)
    named = reference or asked.reference
    other = prompts.named(subject, named, "eval.reference")
    ours = prompts.drawn(subject, asked, samples=samples, temperature=1.0, max_new_tokens=max_new_tokens)
    theirs = prompts.drawn(other, asked, samples=samples, temperature=1.0, max_new_tokens=max_new_tokens)
    forth = _told(subject, other, ours.groups)
    back = _told(other, subject, theirs.groups)
    of_target, notes = _of_target(subject, other, named, asked, ours)
    values = [
        {
            "kl": there["rollout/kl"],
            "kl_from_reference": here["rollout/kl"],
            "entropy": there["rollout/entropy"],
            **more,
        }
        for there, here, more in zip(forth, back, of_target, strict=True)
    ]
    rows = zip(prompts.ids(asked.groups), values, ours.prompts, ours.texts, strict=True)
    return Result(
        [Item(name, of, {"prompt": prompt, "responses": texts}) for name, of, prompt, texts in rows],
        made={**asked.made, "samples": samples, "max_new_tokens": ours.max_new_tokens, "reference": named},
        notes=[*prompts.tell_cut(ours.responses), *notes],
    )


def _told(sampled: Subject, other: Subject, groups: Sequence[Group]) -> list[dict[str, float]]:
    """The metrics of each prompt's samples of a model, compared with another."""
    rows = zip(groups, sampled.measure(groups, "policy"), other.measure(groups, "policy"), strict=True)
    return [_means(*row) for row in rows]


def _means(group: Group, policy: Tensor, reference: Tensor) -> dict[str, float]:
    lengths = torch.tensor([[len(each) for each in group.responses]])
    found = metrics.sampled(policy[None].double(), reference[None].double(), torch.zeros_like(policy)[None], lengths)
    return {name: float(total / count) for name, (total, count) in found.items()}


def _of_target(
    subject: Subject, other: Subject, named: str, asked: HeldOut, ours: Drawn
) -> tuple[list[dict[str, float]], list[str]]:
    """The metrics of each prompt's samples as an approximation of the run's target, and what is to be said of them."""
    experiment = asked.experiment
    none: list[dict[str, float]] = [{} for _ in ours.groups]
    if experiment is None or experiment.target is None or subject.run is None:
        return none, []
    if named != asked.reference:
        return none, [f"the target is not looked at: it is made of {asked.reference}, and eval.reference={named}"]
    if experiment.tempered:
        return none, ["the target is not looked at: the run approximates it at another temperature than 1"]
    there = committed(subject.run / "checkpoints")
    learnt: Mapping[str, Any] = there[0].state()["columns"] if there else {}
    if experiment.moments is not None and "lambdas" not in learnt:
        return none, ["the target is not looked at: its λ went with the run's checkpoints"]
    column = Frozen(other.model, other.manner)
    makers = producers(experiment) | online(experiment, learnt)
    makers |= {"log_z": LogZ(experiment.normaliser), "reference": column}
    method = Method(experiment, makers, experiment.evaluated)
    groups = _rated(subject, experiment, ours)
    found: dict[int, dict[str, float]] = {}
    for part, filled in measured_parts(subject.measuring, method, groups):
        found |= dict(zip(part.groups, figures_of_each(method, filled), strict=True))
    few = experiment.normaliser == "prompt" and len(ours.texts[0]) < ENOUGH
    left_out = OF_Z if few else ()
    notes = [f"fewer than {ENOUGH} samples of a prompt: what depends on its own Z is left out"] if few else []
    kept = [
        {
            _named(name): value
            for name, value in found[place].items()
            if name.startswith(tuple(OF_A_TARGET)) and name not in (*left_out, *OF_ALL)
        }
        for place in range(len(groups))
    ]
    return kept, [*notes, "divergences to the target take its Z, estimated from the same samples, for exact"]


def _named(name: str) -> str:
    prefix = next(prefix for prefix in OF_A_TARGET if name.startswith(prefix))
    return OF_A_TARGET[prefix] + name.removeprefix(prefix)


def _rated(subject: Subject, experiment: Experiment, ours: Drawn) -> list[Group]:
    """The samples with what the target asks of them: their ratings or features, and their own probability.

    Ratings are those of training, which takes `source.missing_eos_penalty` from a response that did not end.

    Raises:
        UserError: one cannot be rated.
    """
    groups = [
        replace(
            group,
            behavior=tuple(row[: len(each)].double().numpy() for row, each in zip(rows, group.responses, strict=True)),
        )
        for group, rows in zip(ours.groups, subject.measure(ours.groups, "policy_tokens"), strict=True)
    ]
    if experiment.moments is None:
        penalty = experiment.tree["source"]["missing_eos_penalty"]
        cut = [np.array([not each.ended for each in row], dtype=np.float32) for row in ours.responses]
        rate = prompts.rater(subject, experiment.tree["scorer"])
        found = [
            replace(each, ratings=each.ratings - penalty * missed) if isinstance(each, Group) else each
            for each, missed in zip(rate(groups), cut, strict=True)
        ]
    else:
        raters = [ByProgram(each.scorer, subject.tokenizer) for each in experiment.moments.features.values()]
        columns = [prompts.rated(rate, groups) for rate in raters]
        found = [
            replace(
                group,
                ratings=np.array(told[0], dtype=np.float32),
                given={"features": np.array(told, dtype=np.float32).T},
            )
            for group, *told in zip(groups, *columns, strict=True)
        ]
    rated = [each for each in found if isinstance(each, Group)]
    if len(rated) < len(groups):
        raise UserError(f"{len(groups) - len(rated)} prompts have samples that the run's scorer does not rate.")
    return rated
