"""How good samples are, by a program or a reward model, and how often they beat those of another model."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from align_cli.config import Tree
from align_cli.data.store import Group
from align_cli.errors import UserError
from align_cli.evals import Item, Result, Training, prompts
from align_cli.evals.prompts import HeldOut
from align_cli.ranges import Count, NonNegative, NotEmpty
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
    asked = prompts.held_out(subject, training, limit=limit, responses=baseline == DATA)
    section = scorer_of(subject, asked, training)
    rate = prompts.rater(subject, section)
    common = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    ours = prompts.drawn(subject, asked, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens)
    notes = prompts.tell_cut(ours.responses)
    theirs: list[Group] = []
    if baseline is not None:
        theirs, told = _baseline(subject, asked, baseline, samples, temperature, max_new_tokens)
        notes += told
    scores = prompts.rated(rate, ours.groups)
    others = prompts.rated(rate, theirs) if theirs else [[]] * len(scores)
    texts = prompts.written(subject, theirs)[1] if theirs else [[]] * len(scores)
    rows = zip(prompts.ids(asked.groups), ours.prompts, ours.texts, scores, texts, others, strict=True)
    items = [_item(name, *row) for name, *row in rows if None not in row]
    if len(items) < len(scores):
        notes.append(f"{len(scores) - len(items)} of {len(scores)} prompts are left out: a response got no score")
    scorer = ", ".join(f"{key}={value}" for key, value in section.items())
    return Result(items, made={**asked.made, **common, "scorer": scorer, "baseline": baseline}, notes=notes)


def _item(
    name: str, prompt: str, texts: list[str], scores: list[float], their_texts: list[str], theirs: list[float]
) -> Item:
    """What was found of one prompt; without a baseline, its texts and scores are empty."""
    values, shown = {"score": fmean(scores)}, {"prompt": prompt, "responses": texts, "scores": scores}
    if theirs:
        values |= {"win_rate": wins(scores, theirs), "score_baseline": fmean(theirs)}
        shown |= {"baseline": their_texts, "scores_baseline": theirs}
    return Item(name, values, shown)


def wins(ours: Sequence[float], theirs: Sequence[float]) -> float:
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
    if asked.data.name == "toy":
        return OF_THE_WORLD
    raise UserError(
        "nothing says how good a response is: use scorer=model scorer.path=REWARD_MODEL, or a program such as "
        "scorer=matches scorer.pattern=REGEX."
    )


def _baseline(
    subject: Subject, asked: HeldOut, name: str, samples: int, temperature: float, max_new_tokens: int
) -> tuple[list[Group], list[str]]:
    """The prompts with what the subject's samples are held against, and notes on it."""
    if name != DATA:
        other = prompts.named(subject, name, "eval.baseline")
        found = prompts.drawn(other, asked, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens)
        return found.groups, [f"baseline: {note}" for note in prompts.tell_cut(found.responses)]
    if not all(group.responses for group in asked.groups):
        raise UserError("eval.baseline=data: the run's data holds prompts alone; use a run or model.")
    best = [int(np.argmax(group.ratings)) for group in asked.groups]
    groups = [
        Group(group.index, group.prompt, (group.responses[place],), group.ratings[[place]], group.where)
        for group, place in zip(asked.groups, best, strict=True)
    ]
    return groups, []
