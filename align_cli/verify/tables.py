"""A language model small enough that every expectation is a sum.

It has a table of logits for each step, a row for each prefix: any distribution over all V^T sequences of T tokens is
one of these models, and the log-probabilities of all of them are one vector, in lexicographic order.

The reference of the proofs gives each sequence a whole number of N parts. Repeating each sequence that many times
makes N candidates whose plain mean is the expectation under the reference: K-sample losses taken on them have their
value in the limit of infinitely many samples, exactly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def log_probabilities(tables: Sequence[Tensor]) -> Tensor:
    """log π of all sequences.

    Args:
        tables: for each step t, logits (V^t, V), or (1, V) where the step does not look at the prefix.

    Returns:
        (V^T,) nats; the probabilities sum to 1.
    """
    total = torch.zeros(1, dtype=torch.float64)
    for logits in tables:
        total = (total[:, None] + logits.log_softmax(-1)).reshape(-1)
    return total


def random_parts(sequences: int, seed: int) -> Tensor:
    """(sequences,) whole numbers from 1 to 4, the reference's probabilities in parts."""
    return torch.randint(1, 5, (sequences,), generator=torch.Generator().manual_seed(seed))


def candidates(parts: Tensor) -> Tensor:
    """(N,) indices of sequences, each as often as it has parts."""
    return torch.arange(len(parts)).repeat_interleave(parts)
