"""Language models whose every expectation is a sum (`align_cli.verify.tables`): made, enumerated, optimised."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from align_cli.verify.tables import log_probabilities

Tables = list[Tensor]


def tables_of(log_weights: Tensor, vocabulary: int, steps: int) -> Tables:
    """The model whose distribution is softmax(log_weights), (V^T,)."""
    return [log_weights.reshape(vocabulary**step, vocabulary, -1).logsumexp(-1) for step in range(steps)]


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
