"""Held-out evaluation: of the loss, of the policy's samples, and of responses that a program can judge."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align_cli import distributed
from align_cli.data.batches import Measured, Part, split
from align_cli.data.store import Group, Store
from align_cli.diversity import distinct, self_bleu
from align_cli.engine import Engine, Measuring
from align_cli.generation import sample, stops
from align_cli.method import Meter, Method
from align_cli.normaliser import LogZ
from align_cli.sources import EVALUATION, Sampler
from align_cli.statistics import Interval, clustered_proportion, mean_interval, wilson

ENOUGH = 64  # samples of a prompt from which its own Z is estimated well enough to tell divergences by
OF_Z = tuple(f"divergence/{name}" for name in ("log_z", "forward_kl", "reverse_kl", "tv", "js", "ess"))
BATCH = 512  # sequences generated at a time


@dataclass(frozen=True, slots=True)
class Example:
    """One held-out prompt with its first sampled response, the most likely one, and the reward of the former."""

    prompt: str
    sampled: str
    greedy: str
    reward: float


@dataclass(frozen=True, slots=True)
class Judged:
    """Figures under flat keys, each with `_low` and `_high` for its 95 % interval, and a few responses to look at."""

    figures: dict[str, float]
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class Graded:
    """Responses to one prompt, as a program grades them.

    Attributes:
        rewards: of the sampled ones.
        right: share of the sampled ones that are right.
        right_greedily: whether the most likely one is.
    """

    prompt: str
    sampled: list[str]
    greedy: str
    rewards: list[float]
    right: float
    right_greedily: bool


def grade(
    prompts: Sequence[str],
    sampled: Sequence[list[str]],
    greedy: Sequence[str],
    score: Callable[[str, str], float],
    correct: Callable[[str, str], bool],
) -> list[Graded]:
    """Grade responses to each prompt; `score` and `correct` are those of `exact_match`."""
    return [
        Graded(
            prompt=prompt,
            sampled=drawn,
            greedy=best,
            rewards=[score(prompt, each) for each in drawn],
            right=sum(correct(prompt, each) for each in drawn) / len(drawn),
            right_greedily=correct(prompt, best),
        )
        for prompt, drawn, best in zip(prompts, sampled, greedy, strict=True)
    ]


def graded_figures(graded: Sequence[Graded]) -> dict[str, float]:
    """`exact_match`, `reward` (sampled) and `exact_match_greedy`, with their intervals; prompts are independent."""
    return {
        **flat("exact_match", clustered_proportion([each.right for each in graded])),
        **flat("exact_match_greedy", wilson(sum(each.right_greedily for each in graded), len(graded))),
        **flat("reward", mean_interval([sum(each.rewards) / len(each.rewards) for each in graded])),
    }


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    score: Callable[[str, str], float],
    correct: Callable[[str, str], bool],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    examples: int,
) -> Judged:
    """Judge responses of the model to `prompts`: sampled at temperature 1, and the most likely one.

    Prompts are encoded by the tokenizer as they are, without a chat template. The independent observations are the
    prompts, so that several samples of one prompt do not narrow the intervals as if they were different prompts.

    Args:
        score: the reward of (prompt, response).
        correct: whether (prompt, response) is right.
        samples: responses sampled for each prompt.
        max_new_tokens: longest response, stop token included.
        seed: of the samples.
        examples: how many prompts to show.

    Returns:
        `exact_match`, `reward` (sampled) and `exact_match_greedy`, with their intervals.
    """
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    eos_ids = stops(model, tokenizer)

    def draw(responses: int, temperature: float) -> list[list[str]]:
        found = sample(
            model,
            ids,
            responses=responses,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=[(seed, index) for index in range(len(ids))],
            batch=BATCH,
            pad_id=eos_ids[0],
            eos_ids=eos_ids,
        )
        texts = {
            index: tokenizer.batch_decode([each.tokens for each in drawn], skip_special_tokens=True)
            for index, drawn in found
        }
        return [texts[index] for index in range(len(ids))]

    sampled, greedy = draw(samples, 1.0), [drawn[0] for drawn in draw(1, 0.0)]
    graded = grade(prompts, sampled, greedy, score, correct)
    shown = [Example(each.prompt, each.sampled[0], each.greedy, each.rewards[0]) for each in graded[:examples]]
    return Judged(graded_figures(graded), shown)


def flat(name: str, interval: Interval) -> dict[str, float]:
    """An interval under the keys `name`, `name_low` and `name_high`."""
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


@torch.no_grad()
def measured_parts(engine: Measuring, method: Method, groups: Sequence[Group]) -> Iterator[tuple[Part, dict[str, Any]]]:
    """Each micro-batch of this rank's share of some groups, with all its columns; every rank iterates alike."""
    places = range(len(groups))
    budget = method.experiment.engine.micro_tokens
    parts = split(places, engine.manner.lengths(Measured.of(groups)), ranks=distributed.world(), budget=budget)
    mine = parts[distributed.rank()]
    method.begin(groups)
    batches = [engine.manner.flatten([groups[place] for place in p.groups], counted=p.counted) for p in mine]
    for part, columns_of in zip(mine, method.columns(engine, batches), strict=True):
        yield part, method.measured(engine, columns_of)


def figures_of_each(method: Method, filled: Mapping[str, Any]) -> list[dict[str, float]]:
    """The metrics of each group of a micro-batch by itself; infinite ones are left out."""
    found: list[dict[str, float]] = []
    for place in range(len(filled["lengths"])):
        own = {name: value[place : place + 1] for name, value in filled.items() if isinstance(value, torch.Tensor)}
        pairs = {name: (float(total), float(count)) for name, (total, count) in method.metrics(own).items()}
        means = {name: total / count for name, (total, count) in pairs.items() if count > 0}
        found.append({name: mean for name, mean in means.items() if math.isfinite(mean)})
    return found


@torch.no_grad()
def evaluate_loss(engine: Engine, method: Method, store: Store) -> dict[str, float]:
    """The loss and all metrics on the first `eval.groups` held-out groups; every rank calls it."""
    groups = [store[index] for index in range(min(method.experiment.eval.groups, len(store)))]
    if not groups:
        return {}
    meter = Meter()
    for part, filled in measured_parts(engine, method, groups):
        if part.counted:
            meter.add({"loss": (method.elements(filled).sum(), method.size(filled))} | method.metrics(filled))
    return meter.read()


@torch.no_grad()
def evaluate_samples(engine: Engine, method: Method, sampler: Sampler, prompts: Store) -> dict[str, float]:
    """What responses to the first `eval.groups` held-out prompts are like, sampled `eval.samples` times each.

    Every rank calls it.

    Returns:
        `alignment`, the mean rating, with `_low` and `_high` of its 95 % interval, prompts being the independent
        observations; `unrated`, prompts without a rating, which count in nothing else; `moment/<feature>`, as
        `alignment` of a target's features; `diversity/distinct_1` to `_3`, and `diversity/self_bleu`, of each sample
        against the others of its prompt; of a target `divergence/ess`, the effective number of the samples as ones of
        the target; and the step's figures (`align_cli.metrics`). A target's Z is estimated from all samples of the run
        and these, because those of the policy alone do not show what it has lost; where each prompt has its own, and
        few samples to estimate it from, what depends on it is left out.
    """
    experiment = method.experiment
    asked = [prompts[index] for index in range(min(experiment.eval.groups, len(prompts)))]
    if not asked:
        return {}
    seed = (experiment.run.seed, EVALUATION)
    temperature = None if experiment.tempered else 1.0
    drawn = sampler.draw(asked, seed, samples=experiment.eval.samples, temperature=temperature)
    sampler.spent.clear()
    learnt = method.producers.get("log_z")
    sums = learnt.state() if isinstance(learnt, LogZ) and experiment.normaliser == "shared" else None
    log_z = LogZ(experiment.normaliser, sums)
    apart = replace(method, producers={**method.producers, "log_z": log_z})
    meter, weights = Meter(), list[float]()  # log p/π of each sample
    for part, filled in measured_parts(engine, apart, drawn):
        if part.counted:
            meter.add(apart.metrics(filled))
            if "target" in filled:
                weights += (filled["target"] - filled["policy"] - filled["log_z"][:, None]).flatten().tolist()
    told = _mean("alignment", [group.ratings for group in drawn])
    told["unrated"] = len(asked) - len(drawn)
    texts = [sampler.texts(group) for group in drawn]
    every = [text for of_prompt in texts for text in of_prompt]
    told |= {f"diversity/distinct_{n}": distinct(every, n) for n in (1, 2, 3)}
    if experiment.eval.samples > 1:
        told["diversity/self_bleu"] = fmean(score for of_prompt in texts for score in self_bleu(of_prompt))
    if experiment.target is not None:
        told["divergence/ess"] = effective([weight for theirs in distributed.gather(weights) for weight in theirs])
    names = () if experiment.moments is None else experiment.moments.features
    for place, name in enumerate(names):
        told |= _mean(f"moment/{name}", [group.given["features"][:, place] for group in drawn])
    figures = meter.read()
    if experiment.normaliser == "prompt" and experiment.eval.samples < ENOUGH:
        return {name: value for name, value in (told | figures).items() if name not in OF_Z}
    return told | figures


def effective(log_weights: Sequence[float]) -> float:
    """The effective number of weighted samples, (Σ w)²/Σ w²; 0 where all weights are. L. Kish, 1965."""
    logs = torch.tensor([each for each in log_weights if math.isfinite(each)], dtype=torch.float64)
    return float((2 * logs.logsumexp(0) - (2 * logs).logsumexp(0)).exp()) if len(logs) else 0.0


def _mean(name: str, scores: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """The mean score under `name`, with its bounds; a row of scores for each prompt."""
    means = [float(each.mean(dtype=np.float64)) for each in scores]
    binary = all(score in (0.0, 1.0) for each in scores for score in each.tolist())
    return flat(name, clustered_proportion(means) if binary else mean_interval(means))
