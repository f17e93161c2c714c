"""How good samples are, by a program or a reward model, and how often they beat those of another model."""

from collections.abc import Sequence

import numpy as np

from align_cli.config import Tree
from align_cli.data.store import Group
from align_cli.errors import UserError
from align_cli.evals import Item, Result, Training, prompts
from align_cli.evals.prompts import HeldOut
from align_cli.ranges import Count, NonNegative, NotEmpty
from align_cli.raters import Rater
from align_cli.subject import Subject

DATA = "data"  # names the best of the data's own responses
OF_THE_WORLD = {"name": "addition"}  # who has rated the embedded world's samples


def reward(
    subject: Subject,
    *,
    training: Training,
    limit: Count | None,
    samples: Count,
    temperature: NonNegative,
    max_new_tokens: Count,
    baseline: NotEmpty | None,
) -> Result:
    """The mean score of samples, and the share of a baseline's samples that they beat, ties counted half.

    Args:
        limit: at most so many held-out prompts.
        samples: responses of each model to each prompt; each is held against each of the other.
        temperature: of the samples of both.
        max_new_tokens: longest response; fewer where the model's positions leave less.
        baseline: a run or model, `start` for the run's starting model, `data` for the best response of the data; None:
            no win rate.

    Raises:
        UserError: nothing says who scores, or the baseline has other tokens or no responses.
    """
    asked = prompts.held_out(subject, training, limit=limit)
    section = scorer_of(subject, asked, training)
    rate = prompts.rater(subject, section)
    common = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    ours = prompts.drawn(subject, asked, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens)
    scores = [each.astype(np.float64) for each in rate(ours.groups)]
    notes = prompts.tell_cut(ours.responses)
    values = [{"score": float(each.mean())} for each in scores]
    shown = [
        {"prompt": prompt, "responses": texts, "scores": of.tolist()}
        for prompt, texts, of in zip(ours.prompts, ours.texts, scores, strict=True)
    ]
    if baseline is not None:
        theirs, told = _baseline(subject, asked, baseline, samples, temperature, max_new_tokens)
        their_scores = _rated(rate, theirs)
        notes += told
        texts = prompts.written(subject, theirs)[1]
        for place, (own, other) in enumerate(zip(scores, their_scores, strict=True)):
            values[place] |= {"win_rate": wins(own, other), "score_baseline": float(other.mean())}
            shown[place] |= {"baseline": texts[place], "scores_baseline": other.tolist()}
    scorer = ", ".join(f"{key}={value}" for key, value in section.items())
    return Result(
        [Item(*each) for each in zip(prompts.ids(asked.groups), values, shown, strict=True)],
        made={**asked.made, **common, "scorer": scorer, "baseline": baseline},
        notes=notes,
    )


def wins(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> float:
    """The share of pairs, one of each side, that ours wins; a tie is half a win."""
    difference = np.subtract.outer(np.asarray(ours), np.asarray(theirs))
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def scorer_of(subject: Subject, asked: HeldOut, training: Training) -> Tree:
    """The section `scorer`: of the command line, the run, or the embedded world.

    Raises:
        UserError: there is none.
    """
    named = training.sections.get("scorer") or (subject.config or {}).get("scorer")
    if named:
        return named
    if asked.experiment.data.name == "toy":
        return OF_THE_WORLD
    raise UserError(
        "nothing says how good a response is: scorer=model scorer.path=REWARD_MODEL, or a program such as "
        "scorer=matches scorer.pattern=REGEX, would be right."
    )


def _rated(rate: Rater, groups: Sequence[Group]) -> list[np.ndarray]:
    return [each.astype(np.float64) for each in rate(groups)]


def _baseline(
    subject: Subject, asked: HeldOut, name: str, samples: int, temperature: float, max_new_tokens: int
) -> tuple[list[Group], list[str]]:
    """The prompts with what the subject's samples are held against, and notes on it."""
    if name != DATA:
        other = prompts.named(subject, name, "eval.baseline")
        found = prompts.drawn(other, asked, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens)
        return found.groups, [f"baseline: {note}" for note in prompts.tell_cut(found.responses)]
    if not all(group.responses for group in asked.groups):
        raise UserError("eval.baseline=data: the run's data holds prompts alone; a run or model would be right.")
    best = [int(np.argmax(group.ratings)) for group in asked.groups]
    groups = [
        Group(group.index, group.prompt, (group.responses[place],), group.ratings[[place]], group.where)
        for group, place in zip(asked.groups, best, strict=True)
    ]
    return groups, []
