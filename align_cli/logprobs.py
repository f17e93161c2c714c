"""Log-probabilities of tokens, and their sums over responses."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def wide(x: Tensor) -> Tensor:
    """The same numbers in float32 at least: sums and products of bfloat16 lose what decides."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log π(target | what precedes it), for each position of a flat row.

    The normalisation is in float32 whatever the model's dtype: in bfloat16 the sum over a response of a few hundred
    tokens is off by whole nats. The cast happens inside the softmax, so one (N, V) tensor is made and no second copy.

    Args:
        logits: (N, V) unnormalised, any floating dtype.
        targets: (N,) token ids, int64.

    Returns:
        (N,) nats, at most 0; float32, or float64 where the logits are.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return log_softmax(logits, dim=-1, dtype=dtype).gather(-1, targets[:, None]).squeeze(-1)


def sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of `values` by where they belong: out_s = Σ_{n: index_n = s} values_n.

    Args:
        values: (N,).
        index: (N,) int64 in [0, size).
        size: how many sums.

    Returns:
        (size,), 0 where nothing belongs.
    """
    return values.new_zeros(size).index_add(0, index, values)
