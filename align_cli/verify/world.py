"""A language model small enough that every expectation is a sum, as an ordinary Hugging Face folder.

Two prompts, and twelve responses to each: one letter or two of three, and the stop token. The starting model gives each
response a whole number of parts of its probability, so that responses which are repeated as often as they have parts
are samples of it without any noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align_cli.models.tiny import character_tokenizer
from align_cli.verify import table_model
from align_cli.verify.tables import random_parts

PROMPTS = ("1+1=", "1+2=")
LETTERS = "12+"
LONGEST = 3  # tokens of a response, stop token included
NEVER = -60.0  # logit of a token that no response has


@dataclass(frozen=True)
class World:
    """All that can be said.

    Attributes:
        folder: of the starting model.
        prompts: their texts; texts: of all responses.
        prompt_ids, response_ids: the same as token ids, of responses with the stop token.
        tokens: (S, T) ids of the responses, -1 beyond the end.
        parts: (P, S) whole numbers, each response's share of the starting model.
        start: (P, S) log-probabilities of the starting model, as its weights give them.
    """

    folder: Path
    prompts: Sequence[str]
    texts: Sequence[str]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    tokens: Tensor
    parts: Tensor
    start: Tensor

    @property
    def lengths(self) -> Tensor:
        """(S,) tokens of each response."""
        return (self.tokens >= 0).sum(-1)

    def rated(self, rate: Callable[[str, str], float]) -> Tensor:
        """(P, S) what a scorer says of each response."""
        return torch.tensor([[rate(p, text) for text in self.texts] for p in self.prompts], dtype=torch.float64)

    def logs(self, folder: Path) -> Tensor:
        """(P, S) log-probabilities of all responses under the model of a folder."""
        return logs(folder, self.prompt_ids, self.response_ids)

    @torch.no_grad()
    def scores(self, folder: Path) -> Tensor:
        """(P, S) what the reward model of a folder says, in float64."""
        network: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
        rows = [
            [network(torch.tensor([[*prompt, *response]])).logits.item() for response in self.response_ids]
            for prompt in self.prompt_ids
        ]
        return torch.tensor(rows, dtype=torch.float64)


def build(folder: Path, *, seed: int) -> World:
    """Write the starting model to `folder`."""
    table_model.register()
    tokenizer = character_tokenizer(f"{LETTERS}=", positions=16)
    texts = ["".join(letters) for length in range(1, LONGEST) for letters in product(LETTERS, repeat=length)]
    prompts: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]  # pyright: ignore[reportAssignmentType]
    responses = [[*tokenizer(text)["input_ids"][1:], tokenizer.eos_token_id] for text in texts]  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
    parts = random_parts(len(texts), seed)
    parts = torch.stack([parts.roll(5 * place) for place in range(len(PROMPTS))])  # as many in all for each prompt
    rows = [row for prompt, share in zip(prompts, parts, strict=True) for row in _rows(prompt, responses, share)]
    rows.sort(key=lambda row: row[0])
    config = table_model.TableConfig(
        contexts=[context for context, _ in rows],
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    network: Any = table_model.TableForCausalLM(config)
    with torch.no_grad():
        network.lm_head.weight.copy_(torch.stack([*(logits for _, logits in rows), torch.zeros(len(tokenizer))], -1))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return World(
        folder=folder,
        prompts=PROMPTS,
        texts=texts,
        prompt_ids=prompts,
        response_ids=responses,
        tokens=torch.tensor([response + [-1] * (LONGEST - len(response)) for response in responses]),
        parts=parts,
        start=logs(folder, prompts, responses),
    )


def _rows(prompt: list[int], responses: Sequence[list[int]], parts: Tensor) -> list[tuple[int, Tensor]]:
    """The contexts in responses to a prompt, and the logits with which each response has its parts."""
    base = len(LETTERS) + 5  # tokens: four special ones, the letters, and the sign that ends a prompt
    found: list[tuple[int, Tensor]] = []
    for prefix in sorted({tuple(response[:end]) for response in responses for end in range(len(response) + 1)}):
        mass = torch.zeros(base, dtype=torch.float64)
        for response, part in zip(responses, parts.tolist(), strict=True):
            if tuple(response[: len(prefix)]) == prefix and len(response) > len(prefix):
                mass[response[len(prefix)]] += part
        context = torch.tensor([[*prompt, *prefix]])
        number = int(table_model.code(context, torch.ones_like(context), base)[0, -1])
        found.append((number, mass.log().clamp(min=NEVER).float()))
    return found


@torch.no_grad()
def logs(folder: Path, prompts: Sequence[list[int]], responses: Sequence[list[int]], temperature: float = 1) -> Tensor:
    """(prompts, responses) log-probabilities under the model of a folder, in float64."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return logs_of(network, prompts, responses, temperature)


def logs_of(
    network: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]], temperature: float = 1
) -> Tensor:
    """(prompts, responses) log-probabilities, each response computed by itself."""
    longest = max(map(len, responses))
    mask = torch.tensor([[place < len(each) for place in range(longest)] for each in responses])
    padded = torch.tensor([each + [0] * (longest - len(each)) for each in responses])
    found: list[Tensor] = []
    for prompt in prompts:
        ids = torch.cat([torch.tensor(prompt).expand(len(responses), -1), padded], dim=-1)
        logits = network(ids).logits[:, len(prompt) - 1 : -1] / temperature
        tokens = logits.log_softmax(-1).gather(-1, padded[..., None])[..., 0]
        found.append((tokens * mask).sum(-1))
    return torch.stack(found)


def kl(first: Tensor, second: Tensor) -> float:
    """KL(first ‖ second) in nats, averaged over prompts; +∞ where the second excludes what the first does not."""
    terms = torch.where(first == -torch.inf, 0.0, first.exp() * (first - second))
    return float(terms.sum() / len(first))
