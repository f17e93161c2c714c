"""How far a judge agrees with preferences that were published: the same pairs, judged again."""

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align_cli import verdicts
from align_cli.data import annotations
from align_cli.data.annotations import Pair
from align_cli.errors import UserError
from align_cli.evals import Item, Result
from align_cli.evals.judge import judged_by
from align_cli.judges import Judge
from align_cli.ranges import Count, Fraction, NotEmpty, WholeNumber
from align_cli.statistics import RESAMPLES, kappa, spearman
from align_cli.verdicts import Contest, Verdict

LABELS = (0.0, 0.5, 1.0)  # the second response, none, the first


@dataclass(frozen=True)
class Rate:
    """A model's share of wins over the pairs that it is in, a tie half of one: as published, and of the judge."""

    model: str
    pairs: int
    published: float
    ours: float


@dataclass(frozen=True)
class Calibration:
    """What was found, and the models' win rates."""

    result: Result
    rates: list[Rate]


def calibrate(judge: Judge, *, path: NotEmpty, limit: Count | None, margin: Fraction, seed: WholeNumber) -> Calibration:
    """Judge published pairs again.

    `agreement` is the share of pairs with the same label, a tie being a label of its own; `agreement_decided` that of
    the pairs of which both prefer one; `kappa` the agreement beyond chance; `spearman` the correlation of the ranks of
    the models' win rates. Intervals are over prompts: the pairs of a prompt are not independent observations.

    Args:
        path: a local file in one of the schemas of `align_cli.data.annotations.published`.
        limit: at most so many prompts, drawn at random.
        margin: of the published preference (`annotations.pairs_of`).
        seed: of the drawing.

    Raises:
        UserError: the file cannot be read, or no pair is left.
        RunError: the judge cannot be asked further; what it has said is kept.
    """
    published, digest = annotations.read(path, key="calibrate.path")
    whole = annotations.pairs_of(published, margin=margin)
    pairs = drawn(whole, limit, seed)
    if not pairs:
        raise UserError(f"{path}: no pair is decided by calibrate.margin={margin:g}; use a smaller one.")
    found = verdicts.compare(judge, [Contest(pair.dialogue, *pair.responses) for pair in pairs])
    rates = rates_of(pairs, found)
    made = {
        "data": path,
        "data.digest": digest,
        "pairs": len(pairs),
        "margin": margin,
        "seed": seed,
        **judged_by(judge, found),
    }
    result = Result(items_of(pairs, found), figures_of(pairs, found, rates), made, verdicts.counted(found))
    return Calibration(result, rates)


def drawn(pairs: Sequence[Pair], limit: int | None, seed: int) -> list[Pair]:
    """The pairs of some prompts."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    if limit is None or limit >= len(prompts):
        return list(pairs)
    kept = set(random.Random(f"calibrate {seed}").sample(prompts, limit))
    return [pair for pair in pairs if pair.prompt in kept]


def items_of(pairs: Sequence[Pair], found: Sequence[Verdict]) -> list[Item]:
    """A prompt each, with its pairs."""
    by_prompt: dict[str, list[tuple[Pair, Verdict]]] = defaultdict(list)
    for pair, verdict in zip(pairs, found, strict=True):
        by_prompt[pair.prompt].append((pair, verdict))
    items: list[Item] = []
    for prompt, judged in by_prompt.items():
        same = [pair.label == verdict.win for pair, verdict in judged]
        told = [
            {
                "models": list(pair.models),
                "responses": list(pair.responses),
                "published": pair.label,
                "ours": verdict.win,
                "outcome": verdict.outcome,
                "judge": [verdicts.shown(answer) for answer in verdict.answers],
            }
            for pair, verdict in judged
        ]
        shown = {"dialogue": list(judged[0][0].dialogue), "pairs": told}
        items.append(Item(id=prompt, values={"agreement": sum(same) / len(same)}, shown=shown))
    return items


def figures_of(pairs: Sequence[Pair], found: Sequence[Verdict], rates: Sequence[Rate]) -> dict[str, float]:
    """Agreement over all pairs, with percentile bootstrap intervals over prompts; what has no value is left out."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    place = {prompt: index for index, prompt in enumerate(prompts)}
    counts = np.zeros((len(prompts), 3, 3))
    for pair, verdict in zip(pairs, found, strict=True):
        counts[place[pair.prompt], LABELS.index(pair.label), LABELS.index(verdict.win)] += 1
    share = np.full(len(prompts), 1 / len(prompts))
    often = np.random.default_rng(len(prompts)).multinomial(len(prompts), share, size=RESAMPLES)
    resampled = np.einsum("rp,pij->rij", often, counts)
    measures = {"agreement": agreement, "agreement_decided": agreement_decided, "kappa": kappa}
    figures: dict[str, float] = {}
    for name, measure in measures.items():
        estimate = measure(counts.sum(0).tolist())
        if math.isnan(estimate):
            continue
        low, high = np.nanquantile([measure(each) for each in resampled.tolist()], [0.025, 0.975])
        figures |= {name: estimate, f"{name}_low": float(low), f"{name}_high": float(high)}
    ranks = spearman([rate.published for rate in rates], [rate.ours for rate in rates])
    return figures if math.isnan(ranks) else {**figures, "spearman": ranks}


def agreement(counts: Sequence[Sequence[float]]) -> float:
    """The share on the diagonal."""
    return sum(row[place] for place, row in enumerate(counts)) / sum(map(sum, counts))


def agreement_decided(counts: Sequence[Sequence[float]]) -> float:
    """The share on the diagonal of what neither calls a tie; NaN where there is none."""
    corners = [[counts[row][column] for column in (0, 2)] for row in (0, 2)]
    return agreement(corners) if sum(map(sum, corners)) else math.nan


def rates_of(pairs: Sequence[Pair], found: Sequence[Verdict]) -> list[Rate]:
    """Each model's share of wins, the best as published first."""
    wins: Mapping[str, list[tuple[float, float]]] = defaultdict(list)
    for pair, verdict in zip(pairs, found, strict=True):
        first, second = pair.models
        wins[first].append((pair.label, verdict.win))
        wins[second].append((1 - pair.label, 1 - verdict.win))
    rates = [
        Rate(model, len(told), *(sum(side) / len(told) for side in zip(*told, strict=True)))
        for model, told in wins.items()
    ]
    return sorted(rates, key=lambda rate: -rate.published)
