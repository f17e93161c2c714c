"""The column `log_z`: what normalises a target, estimated from the samples of the run.

    Z(x) = E_{y~q}[ P(x, y) / q(y|x) ]

The estimate is the mean over all samples so far, those of the present step included, and is saved with the run.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from align_cli import distributed
from align_cli.data.batches import MicroBatch
from align_cli.data.store import Group


class LogZ:
    """A running estimate of log Z, one for all prompts or one for each.

    Args:
        by: "shared" or "prompt".
        sums: of an earlier session, see `state`.
    """

    def __init__(
        self, by: Literal["shared", "prompt"], sums: Mapping[str, Sequence[float | None]] | None = None
    ) -> None:
        self.by = by
        # log Σ P/q and the number of samples, by the prompt's digest
        self.sums: dict[str, tuple[float, float]] = {
            name: (-math.inf if total is None else total, count or 0.0) for name, (total, count) in (sums or {}).items()
        }

    def state(self) -> dict[str, list[float | None]]:
        """The sums, as JSON can hold them: null for the logarithm of 0."""
        return {name: [None if total == -math.inf else total, n] for name, (total, n) in self.sums.items()}

    def gather(self, filled: Sequence[Mapping[str, Any]]) -> None:
        """Take in the samples of a step; every rank calls it with the columns of its own micro-batches."""
        mine: dict[str, list[float]] = {}
        for columns in filled:
            batch: MicroBatch = columns["batch"]
            if not batch.counted:
                continue
            weights = (columns["target"] - columns["behavior"]).double().tolist()
            for group, logs in zip(batch.groups, weights, strict=True):
                mine.setdefault(self._name(group), []).extend(logs)
        for theirs in distributed.gather(mine):
            for name, logs in theirs.items():
                total, count = self.sums.get(name, (-math.inf, 0.0))
                every = torch.tensor([total, *logs], dtype=torch.float64)
                self.sums[name] = (float(every.logsumexp(0)), count + len(logs))

    def __call__(self, batch: MicroBatch, target: Tensor, behavior: Tensor) -> Tensor:
        """(B,) log Z of each group's prompt, nats; -∞ where the target excluded every sample of it so far."""
        found: list[float] = []
        for group in batch.groups:
            total, count = self.sums[self._name(group)]
            found.append(total - math.log(count))
        return torch.tensor(found, dtype=target.dtype, device=target.device)

    def _name(self, group: Group) -> str:
        return "" if self.by == "shared" else hashlib.blake2b(group.prompt.tobytes(), digest_size=8).hexdigest()
