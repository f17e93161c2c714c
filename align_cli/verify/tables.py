"""A language model small enough that every expectation is a sum.

It has a table of logits for each step, a row for each prefix: any distribution over all V^T sequences of T tokens is
one of these models, and the log-probabilities of all of them are one vector, in lexicographic order.

The reference of the proofs gives each sequence a whole number of N parts. Repeating each sequence that many times
makes N candidates whose plain mean is the expectation under the reference: K-sample losses taken on them have their
value in the limit of infinitely many samples, exactly.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

Tables = list[Tensor]


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


def tables_of(log_weights: Tensor, vocabulary: int, steps: int) -> Tables:
    """The model whose distribution is softmax(log_weights), (V^T,)."""
    return [log_weights.reshape(vocabulary**step, vocabulary, -1).logsumexp(-1) for step in range(steps)]


def random_parts(sequences: int, seed: int) -> Tensor:
    """(sequences,) whole numbers from 1 to 4, the reference's probabilities in parts."""
    return torch.randint(1, 5, (sequences,), generator=torch.Generator().manual_seed(seed))


def candidates(parts: Tensor) -> Tensor:
    """(N,) indices of sequences, each as often as it has parts."""
    return torch.arange(len(parts)).repeat_interleave(parts)


def tuples(sequences: int, size: int) -> Tensor:
    """(sequences^size, size): all ways to draw `size` sequences, with repetition."""
    return torch.tensor(list(product(range(sequences), repeat=size)))


def optimise(loss: Callable[[Tensor], Tensor], tables: Sequence[Tensor], steps: int = 400) -> Tensor:
    """Minimise loss(log π) over the tables by L-BFGS, from a copy of `tables`.

    Returns:
        log π of all sequences at the minimum.
    """
    parameters = [table.detach().clone().requires_grad_() for table in tables]
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        max_eval=2 * steps,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimiser.zero_grad()
        value = loss(log_probabilities(parameters))
        value.backward()
        return value.item()

    optimiser.step(closure)
    return log_probabilities(parameters).detach()
