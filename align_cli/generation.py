"""Sampling responses from a causal language model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from align_cli import distributed
from align_cli.engine import Network

LOOK = 8  # tokens between two looks at whether a text has ended
DROPPED = 1 / 8  # share of a batch's responses that have ended when they are taken out; each time the cache is copied


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sampled response.

    Attributes:
        tokens: its ids; the last is a stop token, unless it was cut.
        logprobs: log-probability of each of them under the distribution that they were drawn from, nats; 0 at
            temperature 0.
        ended: whether a stop token, or what `halted` looks for, ended it.
    """

    tokens: list[int]
    logprobs: list[float]
    ended: bool


Halted = Callable[[list[list[int]]], list[bool]]
"""Whether each of some responses, from their tokens so far, is to end here."""


def sample(
    model: Network,
    prompts: Sequence[Sequence[int]],
    *,
    responses: int,
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[Sequence[int]],
    batch: int,
    pad_id: int,
    eos_ids: Sequence[int],
    first: int = 0,
    halted: Halted | None = None,
    look: int = LOOK,
) -> Iterator[tuple[int, list[Drawn]]]:
    """Draw `responses` continuations of each prompt, token by token.

    A response depends on (its prompt's seed, the number of the response) and not on which others share its batch, up
    to the rounding of the logits: each has its own stream of uniform numbers, one for each token (`choose`).

    Args:
        model: left in the mode (training or evaluation) in which it came.
        prompts: token ids of each prompt, none empty.
        responses: K, continuations per prompt; a prompt is read once for all of them.
        max_new_tokens: longest response, stop token included.
        temperature: divides the logits; 0 takes the most likely token.
        seeds: of each prompt's draws, whole numbers >= 0.
        batch: sequences generated at a time; more is faster and takes more memory.
        pad_id: any token id; it fills the left of shorter prompts and is not attended to.
        eos_ids: the tokens that end a response.
        first: number of each prompt's first response, to go on from where an earlier call has ended.
        halted: what else ends a response; it is asked after every `look` tokens, and the response ends there.

    Yields:
        (index of the prompt, its `responses`) in order of increasing prompt length.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    per_batch = max(1, batch // responses)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), per_batch):
            chunk = order[start : start + per_batch]
            found: list[list[Drawn]] = [[] for _ in chunk]
            for done in range(0, responses, batch):  # in one go, unless a prompt's responses alone are too many
                numbers = range(first + done, first + min(responses, done + batch))
                uniform = np.stack(
                    [
                        np.random.default_rng([*seeds[index], number]).random(max_new_tokens)
                        for index in chunk
                        for number in numbers
                    ]
                )
                drawn = _continue(
                    model,
                    [prompts[index] for index in chunk],
                    torch.from_numpy(uniform),
                    responses=len(numbers),
                    temperature=temperature,
                    pad_id=pad_id,
                    eos_ids=eos_ids,
                    halted=halted,
                    look=look,
                )
                for row, own in enumerate(found):
                    own += drawn[row * len(numbers) : (row + 1) * len(numbers)]
            yield from zip(chunk, found, strict=True)
    finally:
        model.train(training)


@torch.no_grad()
def _continue(
    model: Network,
    prompts: Sequence[Sequence[int]],
    uniform: Tensor,
    *,
    responses: int,
    temperature: float,
    pad_id: int,
    eos_ids: Sequence[int],
    halted: Halted | None,
    look: int,
) -> list[Drawn]:
    """Continue one batch; `uniform` (prompts x responses, max_new_tokens) in [0, 1) makes every choice."""
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    last = uniform.shape[1] - 1
    cache = _cache(model, tokens=width + last)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(responses)
    mask = mask.repeat_interleave(responses, 0)
    logits = output.logits[:, -1].repeat_interleave(responses, 0)
    uniform = uniform.to(device)
    stops = torch.tensor(list(eos_ids), device=device)
    # Under ZeRO-3 every rank draws every response: one that rounds otherwise must not leave the others waiting.
    together = distributed.world() > 1 and any(hasattr(weight, "ds_id") for weight in model.parameters())

    tokens = torch.zeros(len(logits), last + 1, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(logits), last + 1, dtype=torch.float64, device=device)
    rows = torch.arange(len(logits), device=device)  # the response that each row of the batch continues
    going = torch.ones(len(logits), dtype=torch.bool, device=device)
    cut = torch.full((len(logits),), last + 1, device=device)  # tokens after which a response was halted
    for step in range(last + 1):
        chosen, logprobs[rows, step] = choose(logits, uniform[rows, step], temperature)
        if together:
            chosen = distributed.from_first(chosen)
        tokens[rows, step] = chosen
        going &= ~torch.isin(chosen, stops)
        if halted is not None and (step + 1) % look == 0:
            ends = torch.tensor(halted(tokens[rows, : step + 1].tolist()), device=device) & going
            cut[rows[ends]] = step + 1
            going &= ~ends
        left = int(going.sum())
        if step == last or left == 0:
            break
        if left <= (1 - DROPPED) * len(going):
            kept = going.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            rows, mask, chosen, going = rows[kept], mask[kept], chosen[kept], going[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        logits = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    ends = torch.isin(tokens, stops)
    # a response that has ended goes on until it is taken out of the batch
    stopped = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, last + 1)
    ended = ends.any(-1) | (cut <= last)
    counts = torch.minimum(stopped, cut)
    told = zip(tokens.tolist(), logprobs.tolist(), counts.tolist(), ended.tolist(), strict=True)
    return [Drawn(row[:count], nats[:count], end) for row, nats, count, end in told]


class Spacious(DynamicLayer):
    """Keys and values of a layer, with space for so many tokens that none is copied when the next one comes."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.space: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.get_seq_length() == 0:  # the prompt, of which all responses get a copy
            return super().update(key_states, value_states)
        assert self.keys is not None and self.values is not None
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if self.space is None:
            self.space = _with_space(self.keys, self.tokens), _with_space(self.values, self.tokens)
        keys, values = self.space
        keys[..., before:after, :] = key_states
        values[..., before:after, :] = value_states
        self.keys, self.values = keys[..., :after, :], values[..., :after, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.space = None


def _with_space(states: Tensor, tokens: int) -> Tensor:
    """A copy of (N, heads, T, width) with `tokens` for T."""
    copy = states.new_empty(*states.shape[:-2], tokens, states.shape[-1])
    copy[..., : states.shape[-2], :] = states
    return copy


def _cache(model: Network, *, tokens: int) -> DynamicCache:
    """The model's cache; layers that keep all tokens have space for so many of them."""
    cache = DynamicCache(config=model.config)
    cache.layers = [Spacious(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token ids (N,) and their log-probabilities (N,) float64 from logits (N, V).

    The most likely token at temperature 0, with log-probability 0; else the one where `uniform` (N,) falls: a token
    owns an interval of [0, 1) as long as its probability, the intervals in the order of the ids.

    Float64 throughout, so that a number close to 1 finds a token that has probability.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    # in place where it can be: with a large vocabulary each pass over (N, V) costs as much as a layer of a small model
    weights = logits.double() - logits.amax(-1, keepdim=True)
    if temperature != 1:
        weights /= temperature
    weights.exp_()
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = uniform.double().unsqueeze(-1) * total
    chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return chosen.squeeze(-1), (weights.gather(-1, chosen) / total).log().squeeze(-1)


def stops(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the tokenizer's, and those that the model's generation settings name.

    Raises:
        ValueError: there is none.
    """
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = named if isinstance(named, list) else [named]
    found = [token for token in dict.fromkeys([tokenizer.eos_token_id, *several]) if isinstance(token, int)]
    if not found:
        raise ValueError("neither tokenizer nor model names an end-of-sequence token; set eos_token in the tokenizer.")
    return found
