"""Batches of random columns, unequal in all their sizes, so that a swapped axis or a mixed-up prompt shows."""

import torch
from torch import Tensor


def random_columns(prompts: int = 3, responses: int = 4, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """One float64 batch with every column that a loss may ask for, policy unlike reference."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    apart = torch.Generator().manual_seed(seed + 1)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (prompts, responses, 1), generator=apart)

    def inside(*shape: int) -> Tensor:
        return normal(*shape).where(mask, 0.0)

    pairs = torch.rand(prompts, responses, responses, generator=random, dtype=torch.float64)
    pairs = pairs * (1 - torch.eye(responses, dtype=torch.float64))
    return {
        "policy": -20 + 3 * normal(prompts, responses),
        "policy_tokens": -inside(prompts, responses, tokens).abs(),
        "reference": -20 + 3 * normal(prompts, responses),
        "rewards": normal(prompts, responses),
        "lengths": torch.randint(3, 9, (prompts, responses), generator=random),
        "pairs": pairs / pairs.sum((-2, -1), keepdim=True),
        "mismatch_kl": normal(1).abs().expand(prompts),
        "behavior": -20 + 3 * normal(prompts, responses),
        "target": -22 + 3 * normal(prompts, responses),
        "log_z": -2 + normal(prompts),
        "mask": mask,
        "behavior_tokens": -inside(prompts, responses, tokens).abs(),
        "reference_tokens": -inside(prompts, responses, tokens).abs(),
        "values": inside(prompts, responses, tokens),
        "old_values": inside(prompts, responses, tokens),
        "token_rewards": inside(prompts, responses, tokens),
        "advantages": inside(prompts, responses, tokens),
        "returns": inside(prompts, responses, tokens),
        "scores": normal(prompts, responses),
    }
