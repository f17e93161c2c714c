"""The sections of a configuration: what each may hold, as annotated dataclasses (`align_cli.config` checks them)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from align_cli.data.options import Data
from align_cli.engine import EngineOptions, Optimizer
from align_cli.models.adapters import Adapter
from align_cli.models.causal import Model
from align_cli.proposal import Adaptive
from align_cli.ranges import Count, Fraction, NotEmpty, Positive, WholeNumber
from align_cli.raters import FromEnsemble, FromModel, Scorer
from align_cli.reinforcement import AdaptiveKL, FixedKL
from align_cli.sources import FromDataset, FromKept, FromPolicy
from align_cli.tracking import Track


@dataclass(frozen=True, kw_only=True)
class Train:
    """The `train` section: how long and how fast."""

    steps: Count | None
    epochs: Count
    prompts: Count
    together: bool
    lr: Positive
    schedule: Literal["cosine", "linear", "constant"]
    warmup_ratio: Fraction


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The `checkpoint` section."""

    every: Count
    keep: Count


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The `eval` section."""

    every: Count | None
    groups: WholeNumber
    samples: Count
    prompts: WholeNumber


@dataclass(frozen=True, kw_only=True)
class Run:
    """The `run` section."""

    dir: NotEmpty
    seed: WholeNumber


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The `launch` section."""

    name: Literal["local", "prepare"]
    devices: Count | None
    accelerator: Literal["auto", "cpu", "gpu"]
    memory_gb: Positive | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The `reference` section."""

    name: Literal["cached", "frozen", "adapter"]
    path: NotEmpty | None


@dataclass(frozen=True)
class Feature:
    """What a target wants of a scorer: that its mean be the moment."""

    scorer: Scorer
    moment: float


@dataclass(frozen=True)
class Moments:
    """The features of a target, on how many samples its λ is fitted, and whether each prompt is normalised apart."""

    features: Mapping[str, Feature]
    samples: int
    by: Literal["shared", "prompt"]

    @property
    def wanted(self) -> dict[str, float]:
        """The moment of each feature."""
        return {name: feature.moment for name, feature in self.features.items()}


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """What the loop reads of the `target` section."""

    normaliser: Literal["shared", "prompt"]


@dataclass(frozen=True, kw_only=True)
class Fitted(Normalised):
    """What the loop reads of it where the target is fitted to its features."""

    samples: Count


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """What the loop reads of the `advantage` section."""

    whiten: bool


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What the loop reads of the section `reward=contrastive`."""

    responses: Count
    scaling: Literal["none", "dynamic"]


SECTIONS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "optimizer": Optimizer,
    "checkpoint": Checkpoint,
    "eval": Eval,
    "run": Run,
    "launch": Launch,
    "data": Data,
    "model": Model,
    "adapter": Adapter,
    "engine": EngineOptions,
    "track": Track,
}
SOURCES: dict[str, type[FromDataset] | type[FromPolicy]] = {
    "dataset": FromDataset,
    "rollout": FromPolicy,
    "replay": FromKept,
}
# Raters that are models, not functions of texts.
RATERS: dict[str, type[FromModel] | type[FromEnsemble]] = {"model": FromModel, "ensemble": FromEnsemble}
# Sections that choose a part.
PARTS = ("algo", "divergence", "reward", "scorer", "target", "proposal", "advantage", "kl")
PROPOSALS: dict[str, type[Adaptive]] = {"adaptive": Adaptive}
PENALTIES: dict[str, type[FixedKL] | type[AdaptiveKL]] = {"fixed": FixedKL, "adaptive": AdaptiveKL}
