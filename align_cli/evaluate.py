"""Held-out evaluation of responses that a program can judge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align_cli.generation import sample, stops
from align_cli.statistics import Interval, clustered_proportion, mean_interval, wilson

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
    rewards = [[score(prompt, each) for each in drawn] for prompt, drawn in zip(prompts, sampled, strict=True)]
    right = [
        sum(correct(prompt, each) for each in drawn) / samples for prompt, drawn in zip(prompts, sampled, strict=True)
    ]
    right_greedily = sum(correct(prompt, each) for prompt, each in zip(prompts, greedy, strict=True))
    shown = zip(prompts[:examples], sampled, greedy, rewards, strict=False)
    return Judged(
        {
            **flat("exact_match", clustered_proportion(right)),
            **flat("exact_match_greedy", wilson(right_greedily, len(prompts))),
            **flat("reward", mean_interval([sum(each) / samples for each in rewards])),
        },
        [Example(prompt, drawn[0], best, reward[0]) for prompt, drawn, best, reward in shown],
    )


def flat(name: str, interval: Interval) -> dict[str, float]:
    """An interval under the keys `name`, `name_low` and `name_high`."""
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
