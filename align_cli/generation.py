"""Sampling responses from a causal language model."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    responses: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int,
    pad_id: int,
    eos_ids: Sequence[int],
) -> Iterator[tuple[int, list[list[int]]]]:
    """Draw `responses` continuations of each prompt, token by token.

    A response depends on (`seed`, index of the prompt, number of the response) and not on which others share its
    batch, up to the rounding of the logits: each has its own stream of uniform numbers, one for each token (`choose`).

    Args:
        model: left in the mode (training or evaluation) in which it came.
        prompts: token ids of each prompt, none empty.
        responses: K, continuations per prompt; a prompt is read once for all of them.
        max_new_tokens: longest response, stop token included.
        temperature: divides the logits; 0 takes the most likely token.
        seed: of all draws.
        batch: sequences generated at a time; more is faster and takes more memory.
        pad_id: any token id; it fills the left of shorter prompts and is not attended to.
        eos_ids: the tokens that end a response.

    Yields:
        (index of the prompt, its `responses` lists of token ids) in order of increasing prompt length. A response ends
        with its stop token, unless it was cut at `max_new_tokens`.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    per_batch = max(1, batch // responses)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), per_batch):
            chunk = order[start : start + per_batch]
            uniform = np.stack(
                [
                    np.random.default_rng([seed, index, number]).random(max_new_tokens)
                    for index in chunk
                    for number in range(responses)
                ]
            )
            drawn = _continue(
                model,
                [prompts[index] for index in chunk],
                torch.from_numpy(uniform),
                responses=responses,
                temperature=temperature,
                pad_id=pad_id,
                eos_ids=eos_ids,
            )
            for row, index in enumerate(chunk):
                yield index, drawn[row * responses : (row + 1) * responses]
    finally:
        model.train(training)


@torch.no_grad()
def _continue(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniform: Tensor,
    *,
    responses: int,
    temperature: float,
    pad_id: int,
    eos_ids: Sequence[int],
) -> list[list[int]]:
    """Continue one batch; `uniform` (prompts x responses, max_new_tokens) in [0, 1) makes every choice."""
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache = DynamicCache(config=model.config)
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

    drawn: list[list[int]] = [[] for _ in range(len(logits))]
    rows = torch.arange(len(logits), device=device)  # the response that each row of the batch continues
    last = uniform.shape[1] - 1
    for step in range(uniform.shape[1]):
        tokens = choose(logits, uniform[rows, step], temperature)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            drawn[row].append(token)
        going = ~torch.isin(tokens, stops)
        if step == last or not going.any():
            break
        if not going.all():
            kept = going.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            rows, mask, tokens = rows[kept], mask[kept], tokens[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return drawn


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Token ids (N,) from logits (N, V): the most likely at temperature 0, else where `uniform` (N,) falls.

    A token owns an interval of [0, 1) as long as its probability, the intervals in the order of the ids.

    Float64 throughout, so that a number close to 1 finds a token that has probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    target = uniform.double().unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
