"""The column `reference`: log-probabilities of responses under the policy that alignment starts from.

`Cached` measures each response once, before the first update, and keeps the figures on disk under the weights'
digest; later runs with other α, β, K, learning rates or output folders find them there. `Frozen` keeps a second model
beside the policy; `AdapterOff` is the policy without its adapters. All three go through the one `measure`.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from align_cli import distributed, terminal
from align_cli.data.batches import MicroBatch, flatten, split
from align_cli.data.store import Group
from align_cli.engine import Engine
from align_cli.models.adapters import switched_off
from align_cli.models.causal import measure

Say = Callable[[str], None]

_VERSION = 1  # of what is stored; raise it when the meaning of a stored figure changes
_SHARD = 2048  # groups between two writes


def content(group: Group) -> list[bytes]:
    """A 128-bit name for each response in the context of its prompt, from their token ids alone."""
    prompt = np.ascontiguousarray(group.prompt, dtype=np.int32).tobytes()
    head = struct.pack("<q", len(group.prompt)) + prompt
    return [
        hashlib.blake2b(head + np.ascontiguousarray(r, dtype=np.int32).tobytes(), digest_size=16).digest()
        for r in group.responses
    ]


def weights_digest(path: str, commit: str | None) -> str:
    """A digest of a model's weights: of its safetensors in a folder, of its commit on the hub."""
    folder = Path(path)
    digest = hashlib.blake2b(digest_size=16)
    if not folder.is_dir():
        digest.update(f"{path}@{commit}".encode())
        return digest.hexdigest()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class Cached:
    """Log-probabilities on disk, a name of 128 bits and a figure for each response.

    Args:
        folder: where figures of these weights and numerics are kept; shared by runs, also at the same time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.figures: dict[bytes, float] = {}
        self.measured = 0
        folder.mkdir(parents=True, exist_ok=True)
        for shard in sorted(folder.glob("*.npz")):
            try:
                with open(shard, "rb") as file, np.load(file, allow_pickle=False) as stored:
                    names, values = stored["names"], stored["values"]
            except (ValueError, KeyError, EOFError, BadZipFile):  # cut by a full disk or a copy that was interrupted
                if distributed.rank() == 0:
                    terminal.warn(f"{shard} is damaged; its responses are measured again")
                continue
            self.figures |= {name.tobytes(): float(value) for name, value in zip(names, values, strict=True)}

    @staticmethod
    def home(cache: Path, digest: str, *, dtype: torch.dtype, flat: bool, bits: int | None) -> Path:
        """The folder of these weights under these numerics."""
        rows = "shared" if flat else "padded"
        numerics = str(dtype).removeprefix("torch.") if bits is None else f"{bits}bit"
        return cache / "references" / f"{digest}-{numerics}-{rows}-v{_VERSION}"

    def fill(self, engine: Engine, groups: Iterable[Group], *, budget: int, say: Say) -> None:
        """Measure what is missing under the engine's present weights; every rank calls it with the same groups."""
        if len(set(distributed.gather(len(self.figures)))) > 1:  # another run wrote while these ranks read
            for seen in distributed.gather(self.figures):
                self.figures |= seen
        batch: list[Group] = []
        for group in groups:
            if any(name not in self.figures for name in content(group)):
                batch.append(group)
            if len(batch) == _SHARD:
                self._measure(engine, batch, budget, say)
                batch = []
        if batch:
            self._measure(engine, batch, budget, say)

    @torch.no_grad()
    def _measure(self, engine: Engine, groups: Sequence[Group], budget: int, say: Say) -> None:
        say(f"measuring the reference on {sum(len(g.responses) for g in groups)} responses")
        tokens = np.array([len(g.prompt) + sum(len(r) for r in g.responses) for g in groups])
        responses = np.array([len(g.responses) for g in groups])
        parts = split(range(len(groups)), tokens, responses, ranks=distributed.world(), budget=budget)
        found: dict[bytes, float] = {}
        for part in parts[distributed.rank()]:
            members = [groups[index] for index in part.groups]
            policy = engine.measure(flatten(members).to(engine.device))["policy"].cpu()
            for group, row in zip(members, policy.tolist(), strict=True):
                found |= dict(zip(content(group), row, strict=True))
        for others in distributed.gather(found):
            self.figures |= others
            self.measured += len(others)
            if distributed.rank() == 0:
                self._write(others)
        distributed.barrier()

    def _write(self, figures: dict[bytes, float]) -> None:
        names = np.array([np.frombuffer(name, dtype=np.uint8) for name in figures])
        values = np.array(list(figures.values()), dtype=np.float32)
        digest = hashlib.blake2b(names.tobytes(), digest_size=8).hexdigest()
        temporary = self.folder / f".{digest}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            np.savez(file, names=names, values=values)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / f"{digest}.npz")

    def of(self, groups: Sequence[Group]) -> Tensor:
        """(B, K) for groups of one K."""
        return torch.tensor([[self.figures[name] for name in content(group)] for group in groups])

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.of(batch.groups).to(batch.ratings.device)


class Frozen:
    """A second model, measured in every step.

    Args:
        network: the reference, ready to be called on this rank's device.
        flat: whether it takes flat rows.
    """

    def __init__(self, network: nn.Module, *, flat: bool) -> None:
        self.network = network
        self.flat = flat

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        return measure(self.network, batch, flat=self.flat)["policy"]


class AdapterOff:
    """The policy with its adapters switched off, measured in every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        with switched_off(self.engine.network):
            return self.engine.measure(batch)["policy"]


class MismatchKL:
    """The column `mismatch_kl`: KTO's estimate of KL(π_θ || π_ref), from prompts and responses that do not belong.

    Each prompt of a step is paired with the first response of the step's next prompt; the mean of log(π_θ/π_ref) over
    these pairs, not below 0, is the estimate (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1).
    """

    def __init__(self, engine: Engine, reference: Callable[[MicroBatch], Tensor], *, budget: int) -> None:
        self.engine = engine
        self.reference = reference
        self.budget = budget
        self.estimate = 0.0

    @torch.no_grad()
    def begin(self, groups: Sequence[Group]) -> None:
        """Estimate for the step that consists of `groups`, over all ranks; every rank calls it."""
        if len(groups) < 2:
            self.estimate = 0.0  # a prompt alone has no other's response
            return
        pairs = mismatched(groups)
        tokens = np.array([len(pair.prompt) + len(pair.responses[0]) for pair in pairs])
        ones = np.ones(len(pairs), dtype=np.int64)
        parts = split(range(len(pairs)), tokens, ones, ranks=distributed.world(), budget=self.budget)
        summed = torch.zeros((), dtype=torch.float64)
        for part in parts[distributed.rank()]:
            batch = flatten([pairs[index] for index in part.groups]).to(self.engine.device)
            ratio = self.engine.measure(batch)["policy"] - self.reference(batch)
            summed += float(part.counted) * ratio.sum().cpu()
        self.estimate = max(0.0, float(distributed.total(summed, self.engine.device)) / len(pairs))

    def __call__(self, ratings: Tensor) -> Tensor:
        return torch.full_like(ratings[:, 0], self.estimate)


def mismatched(groups: Sequence[Group]) -> list[Group]:
    """Each prompt with the first response of the next one, K = 1."""
    following = [*groups[1:], groups[0]]
    return [
        replace(own, responses=(other.responses[0],), ratings=own.ratings[:1])
        for own, other in zip(groups, following, strict=True)
    ]
