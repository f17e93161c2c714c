"""The column `reference`: log-probabilities of responses under the policy that alignment starts from.

`Cached` measures each response once, before the first update, and keeps the figures on disk under the weights'
digest; later runs with other α, β, K, learning rates or output folders find them there. `Frozen` keeps a second model
beside the policy; `AdapterOff` is the policy without its adapters. All three go through the one `measure`.
"""

import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from align_cli import distributed, paths
from align_cli.cache import MISSING, OWN, Figures, Folder, Names, file_digest, names_of
from align_cli.data.batches import Measured, MicroBatch, split
from align_cli.data.store import Group, Store
from align_cli.engine import Engine, Measuring
from align_cli.models.adapters import switched_off
from align_cli.models.causal import Manner, Model, commit_of, measure, read_architecture

Say = Callable[[str], None]

_VERSION = 3  # of what is stored; raise it when the meaning of a stored figure changes
CHUNK = 1024  # groups looked up at a time
FIRST = 32  # groups of each rank that are measured before the first write
FEWEST, MOST = 8, 2048  # groups of each rank between two writes
PERIOD = 30.0  # seconds between two writes; a killed run measures again what it did in them
COUNTERS = ("reference/measured", "reference/found", "reference/seconds")  # what the summary of a run tells


def content(group: Group) -> list[bytes]:
    """A 128-bit name for each response in the context of its prompt, from their token ids alone."""
    head = hashlib.blake2b(struct.pack("<q", len(group.prompt)), digest_size=16)
    head.update(np.ascontiguousarray(group.prompt, dtype=np.int32).data)
    names: list[bytes] = []
    for response in group.responses:
        name = head.copy()
        name.update(np.ascontiguousarray(response, dtype=np.int32).data)
        names.append(name.digest())
    return names


def weights_digest(path: str, commit: str | None) -> str:
    """A digest of a model's weights: of its safetensors in a folder, of its commit on the hub."""
    folder = Path(path)
    digest = hashlib.blake2b(digest_size=16)
    if not folder.is_dir():
        if commit is None:
            raise ValueError(f"{path} is no folder; the weights of a model of the hub are known by its commit")
        digest.update(f"{path}@{commit}".encode())
        return digest.hexdigest()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{file.name} {file_digest(file, paths.cache() / 'weights')}\n".encode())
    return digest.hexdigest()


def digest_of(model: Model) -> str:
    """The digest of the weights that a `model` section names, at its revision."""
    read_architecture(model)
    return weights_digest(model.path, commit_of(model))


def rows(manner: Manner) -> str:
    """The `model.rows` that is meant."""
    return "padded" if not manner.flat else "shared" if manner.share else "packed"


def numerics(*, dtype: torch.dtype, bits: int | None, manner: Manner, device: torch.device) -> str:
    """What decides the rounding of a figure, as a name: figures of other numerics are never mixed.

    Args:
        dtype: of weights and activations.
        bits: of quantised weights.
        manner: how the model is measured; the budget of logits does not matter.
        device: whose kernels compute.
    """
    parts = [str(dtype).removeprefix("torch."), device.type, rows(manner)]
    if manner.transform is None:
        parts.append("plain")
    if bits is not None:
        parts.insert(1, f"{bits}bit")
    # "high" and "medium" let fp32 matrices be multiplied in fewer bits, where the hardware can.
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        parts.insert(1, torch.get_float32_matmul_precision())
    return "-".join(parts)


class Cached:
    """Log-probabilities on disk, a name of 128 bits and a figure for each response.

    Args:
        folder: where figures of these weights and numerics are kept; shared by runs, also at the same time.
        origin: what they are measured with, for `align cache`.

    Attributes:
        measured: responses that this run has measured.
        found: responses that this run asked for and found, each time that it asked.
        seconds: spent on looking up and measuring before the first step.
    """

    def __init__(self, folder: Path, origin: Mapping[str, str | int | None] | None = None) -> None:
        # On each machine one process writes; the others wait until it has tidied.
        self.writes = os.environ.get("LOCAL_RANK", str(distributed.rank())) == "0"
        if not self.writes:
            distributed.barrier()
        self.kept = Folder(folder, tidies=self.writes)
        if self.writes:
            if origin is not None:
                self.kept.describe(origin)
            distributed.barrier()
        self.measured = 0
        self.found = 0
        self.seconds = 0.0
        self.capacity = FIRST * distributed.world()

    @staticmethod
    def home(cache: Path, digest: str, numerics: str) -> Path:
        """The folder of these weights under these numerics."""
        return cache / "references" / f"{digest}-{numerics}-v{_VERSION}"

    def counters(self) -> dict[str, int | float]:
        """What the summary of a run tells."""
        return dict(zip(COUNTERS, (self.measured, self.found, self.seconds), strict=True))

    def fill(self, engine: Engine, groups: Iterable[Group], *, budget: int, say: Say) -> None:
        """Measure what is missing under the engine's present weights; every rank calls it with the same groups.

        Memory does not grow with the number of groups, as long as the disk takes the figures.

        Args:
            groups: looked at once, in order.
            budget: most tokens of a micro-batch.
            say: is told what is measured.
        """
        begun = time.perf_counter()
        source = iter(groups)
        pending: list[Group] = []
        named: set[bytes] = set()  # of what is pending
        while chunk := list(islice(source, CHUNK)):
            pending += self._missing(chunk, named)
            while len(pending) >= self.capacity:
                batch, pending = pending[: self.capacity], pending[self.capacity :]
                self._measure(engine, batch, budget, say)
                named = {name for group in pending for name in content(group)}
        if pending:
            self._measure(engine, pending, budget, say)
        self.kept.let_go()
        self.seconds += time.perf_counter() - begun

    def fill_store(self, engine: Engine, store: Store, indices: NDArray[np.int64], *, budget: int, say: Say) -> None:
        """`fill` with some groups of a store, each given once; not even looked up where all are known to be there."""
        begun = time.perf_counter()
        if all(distributed.gather(self.kept.covers(store.digest))):
            self.found += int(store.responses[indices].sum())
            self.seconds += time.perf_counter() - begun
            return
        self.fill(engine, (store[int(index)] for index in indices), budget=budget, say=say)
        if len(indices) == len(store) and self.writes:
            self.kept.cover(store.digest)

    def _missing(self, groups: Sequence[Group], named: set[bytes]) -> Iterator[Group]:
        """Groups of the responses that no rank has a figure of, and that are not among `named` yet."""
        told = [content(group) for group in groups]
        names = names_of([name for each in told for name in each])
        values, state = self.kept.find(names)
        there = state != MISSING
        if distributed.world() > 1:
            there = self._agree(names, values, there)
        self.found += int((there & (state != OWN)).sum())
        if there.all():
            return
        place = 0
        for group, each in zip(groups, told, strict=True):
            lacking = [k for k, name in enumerate(each) if not there[place + k] and name not in named]
            place += len(each)
            lacking = [k for n, k in enumerate(lacking) if each[k] not in [each[j] for j in lacking[:n]]]
            if lacking:
                named.update(each[k] for k in lacking)
                yield replace(
                    group, responses=tuple(group.responses[k] for k in lacking), ratings=group.ratings[lacking]
                )

    def _agree(self, names: Names, values: Figures, there: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Have figures that another rank sees: it may have looked later, or at another machine's disk."""
        seen = distributed.gather(np.packbits(there))
        if all(np.array_equal(bits, seen[0]) for bits in seen):
            return there
        for other_names, other_values in distributed.gather((names[there], values[there])):
            fresh = self.kept.find(other_names)[1] == MISSING
            if fresh.any():
                self.kept.adopt(other_names[fresh], other_values[fresh], own=False)
        return np.any([np.unpackbits(bits, count=len(there)).astype(bool) for bits in seen], axis=0)

    @torch.no_grad()
    def _measure(self, engine: Engine, groups: Sequence[Group], budget: int, say: Say) -> None:
        """Measure groups, whose responses are all new, and commit them as one shard."""
        begun = time.perf_counter()
        lengths = Measured.of(groups)
        responses = lengths.responses
        first = np.cumsum(responses) - responses
        say(f"measuring the reference on {responses.sum():,} responses" + self._so_far())
        parts = split(range(len(groups)), engine.manner.lengths(lengths), ranks=distributed.world(), budget=budget)
        places: list[NDArray[np.int64]] = []
        figures: list[NDArray[np.float32]] = []
        for part in parts[distributed.rank()]:
            batch = engine.manner.flatten([groups[index] for index in part.groups]).to(engine.device)
            policy = engine.measure(batch)["policy"].float().cpu().numpy()
            if part.counted:
                places += [first[index] + np.arange(responses[index]) for index in part.groups]
                figures.append(policy.reshape(-1))
        values = np.full(int(responses.sum()), np.nan, dtype=np.float32)
        mine = (_joined(places, np.int64), _joined(figures, np.float32), time.perf_counter() - begun)
        shares = distributed.gather(mine)
        for place, figure, _ in shares:
            values[place] = figure
        self._commit(groups, values)
        longest = max(seconds for *_, seconds in shares)
        self.capacity = int(np.clip(len(groups) * PERIOD / max(longest, 1e-3) / distributed.world(), FEWEST, MOST))
        self.capacity *= distributed.world()

    def _commit(self, groups: Sequence[Group], values: Figures) -> None:
        told = [content(group) for group in groups]
        names = names_of([name for each in told for name in each])
        if self.writes:
            self.kept.add(names, values)
            self.kept.keep_samples(
                [
                    (name, group.prompt, response)
                    for group, each in zip(groups, told, strict=True)
                    for name, response in zip(each, group.responses, strict=True)
                ]
            )
        distributed.barrier()
        self.kept.adopt(names, values, own=True)
        self.measured += len(names)

    def _so_far(self) -> str:
        return f"; {self.measured:,} are done" if self.measured else ""

    def of(self, groups: Sequence[Group]) -> Tensor:
        """(B, K) for groups of one K."""
        names = names_of([name for group in groups for name in content(group)])
        values, state = self.kept.find(names)
        assert (state != MISSING).all(), "every response that is trained on or evaluated was given to `fill`"
        return torch.from_numpy(values).view(len(groups), -1)

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.of(batch.groups).to(batch.ratings.device)


def _joined(arrays: Sequence[NDArray[np.generic]], kind: type[np.generic]) -> NDArray[np.generic]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=kind)


class Frozen:
    """A second model, measured in every step.

    Args:
        network: the reference, ready to be called on this rank's device.
        manner: how it is measured.
    """

    def __init__(self, network: nn.Module, manner: Manner) -> None:
        self.network = network
        self.manner = manner

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.measure(batch)["policy"]

    def tokens(self, batch: MicroBatch) -> Tensor:
        """The column `reference_tokens`."""
        return self.measure(batch)["policy_tokens"]

    @torch.no_grad()
    def measure(self, batch: MicroBatch) -> dict[str, Tensor]:
        """As `align_cli.models.causal.measure`."""
        return measure(self.network, batch, self.manner)


class AdapterOff:
    """The policy with its adapters switched off, measured in every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.measure(batch)["policy"]

    def tokens(self, batch: MicroBatch) -> Tensor:
        """The column `reference_tokens`."""
        return self.measure(batch)["policy_tokens"]

    @torch.no_grad()
    def measure(self, batch: MicroBatch) -> dict[str, Tensor]:
        """As `align_cli.models.causal.measure`."""
        with switched_off(self.engine.network):
            return self.engine.measure(batch)


class MismatchKL:
    """The column `mismatch_kl`: KTO's estimate of KL(π_θ || π_ref), from prompts and responses that do not belong.

    Each row of a step is paired with a response of the step's next other prompt; the mean of log(π_θ/π_ref)
    over these pairs, not below 0, is the estimate (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1).
    """

    def __init__(self, engine: Measuring, reference: Callable[[MicroBatch], Tensor], *, budget: int, most: int) -> None:
        self.engine = engine
        self.reference = reference
        self.budget = budget
        self.most = most  # tokens of a pair
        self.estimate = 0.0

    @torch.no_grad()
    def begin(self, groups: Sequence[Group]) -> None:
        """Estimate for the step that consists of `groups`, over all ranks; every rank calls it."""
        pairs = mismatched(groups, self.most)
        if not pairs:
            self.estimate = 0.0  # a prompt alone has no other's response
            return
        parts = split(
            range(len(pairs)),
            self.engine.manner.lengths(Measured.of(pairs)),
            ranks=distributed.world(),
            budget=self.budget,
        )
        summed = torch.zeros((), dtype=torch.float64)
        for part in parts[distributed.rank()]:
            batch = self.engine.manner.flatten([pairs[index] for index in part.groups]).to(self.engine.device)
            ratio = self.engine.measure(batch)["policy"] - self.reference(batch)
            summed += float(part.counted) * ratio.sum().cpu()
        self.estimate = max(0.0, float(distributed.total(summed, self.engine.device)) / len(pairs))

    def __call__(self, ratings: Tensor) -> Tensor:
        return torch.full_like(ratings[:, 0], self.estimate)


def mismatched(groups: Sequence[Group], most: int) -> list[Group]:
    """Each prompt with a response to the next that is another, K = 1; none where all are the same.

    Responses take turns by place, as the best may come first: z is a mean over good and bad ones.

    Args:
        most: tokens of a prompt and a response; of a longer response the end is left out.
    """
    pairs: list[Group] = []
    for place, own in enumerate(groups):
        following = [*groups[place + 1 :], *groups[:place]]
        other = next((each for each in following if not np.array_equal(each.prompt, own.prompt)), None)
        if other is not None:
            response = other.responses[place % len(other.responses)][: max(1, most - len(own.prompt))]
            pairs.append(replace(own, responses=(response,), ratings=own.ratings[:1]))
    return pairs
