"""The distribution q that f-DPG draws from where it is not the policy as it is: the policy as it was some steps ago.

It starts as the policy does, and is renewed when the policy has come nearer to the target than it is, by the forward
KL(p ‖ ·) whatever the run's divergence is: samples of q show what a policy lacks of p, but not what it has where q has
nothing, and the forward KL alone asks for no more. Khalifa, Elsahar, Dymetman, "A Distributional Approach to Controlled
Text Generation", arXiv 2012.11635, "KL-adaptive".

Delta from the paper: both are estimated from the samples that the policy learns from, before it learns from them, and
from no further ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align_cli import distributed
from align_cli.engine import Engine
from align_cli.ranges import Count
from align_cli.surrogates import ratio

UPDATES = "proposal/updates"  # how often f-DPG has renewed what it draws from
SEEN: tuple[str, ...] = ("proposal", "policy", "prompts", "weights", "squares")  # sums over samples


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """The `proposal` section of a run that does not draw from the policy as it is."""

    name: Literal["adaptive"]
    every: Count


class Proposal:
    """q as a copy of the trained weights, which takes their place while samples are drawn.

    Args:
        engine: of the policy, as it starts.
        every: steps whose samples are looked at before each decision.

    Attributes:
        updates: how often q was renewed.
    """

    def __init__(self, engine: Engine, every: int) -> None:
        self.engine = engine
        self.every = every
        self.updates = 0
        self.steps = 0  # since the last decision
        self.step: list[Tensor] = []  # (5,) of each micro-batch since the last step
        self.window: dict[str, float] = dict.fromkeys(SEEN, 0.0)
        with engine.parts() as weights:
            self.weights = {
                name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()
            }

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within the block the engine computes with q's weights; every rank enters it."""
        # An error leaves them in place. It ends the run, and other ranks may not come to the exchange that undoes this.
        self._exchange()
        yield
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        with self.engine.parts() as weights:
            for name, weight in weights.items():
                before = weight.clone()
                weight.copy_(self.weights[name])
                self.weights[name].copy_(before)

    @torch.no_grad()
    def see(self, columns: Mapping[str, Tensor]) -> None:
        """Take in a micro-batch of samples of q, with the policy's columns before it learns from them."""
        known = columns["log_z"] > -torch.inf
        policy, behavior, target = (columns[name][known] for name in ("policy", "behavior", "target"))
        normalised = target.double() - columns["log_z"][known][:, None]
        weight = ratio(policy, behavior).double()
        found = {
            "proposal": forward_kl(behavior, behavior, normalised).sum(),
            "policy": forward_kl(policy, behavior, normalised).sum(),
            "prompts": known.sum(),
            "weights": weight.sum(),
            "squares": weight.square().sum(),
        }
        self.step.append(torch.stack([found[name].double() for name in SEEN]))

    def settle(self) -> dict[str, float]:
        """End a step, and renew q if this is due and the samples say so; every rank calls it.

        Returns:
            proposal/forward_kl and proposal/policy_forward_kl, the estimates of KL(p ‖ q) and KL(p ‖ π) by the steps
            since the last decision, nats; proposal/ess, the effective number of this step's samples as ones of the
            policy, (Σ w)²/Σ w² of w = π/q; proposal/updates.
        """
        # One wait for the device; a rank may have had nothing to see.
        mine: list[float] = torch.stack(self.step).sum(0).tolist() if self.step else [0.0] * len(SEEN)
        step = dict(zip(SEEN, map(sum, zip(*distributed.gather(mine), strict=True)), strict=True))
        self.step = []
        self.window = {name: self.window[name] + step[name] for name in SEEN}
        self.steps += 1
        found: dict[str, float] = {}
        if step["squares"] > 0:
            found["proposal/ess"] = step["weights"] ** 2 / step["squares"]
        if (prompts := self.window["prompts"]) > 0:
            found["proposal/forward_kl"] = self.window["proposal"] / prompts
            found["proposal/policy_forward_kl"] = self.window["policy"] / prompts
        if self.steps == self.every:
            if self.window["policy"] < self.window["proposal"]:
                self._renew()
            self.steps, self.window = 0, dict.fromkeys(SEEN, 0.0)
        return {**found, UPDATES: float(self.updates)}

    @torch.no_grad()
    def _renew(self) -> None:
        with self.engine.parts() as weights:
            for name, weight in weights.items():
                self.weights[name].copy_(weight)
        self.updates += 1

    def save(self, folder: Path) -> None:
        """Write what resuming needs; every rank calls it between two steps."""
        if self._shared() and distributed.rank() > 0:
            return
        numbers = [float(self.updates), float(self.steps), *self.window.values()]
        state = {f"weight/{name}": weight for name, weight in self.weights.items()}
        save_file({**state, "numbers": torch.tensor(numbers, dtype=torch.float64)}, self._file(folder))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; every rank calls it."""
        state = load_file(self._file(folder), device=str(self.engine.device))
        updates, steps, *sums = state.pop("numbers").tolist()
        self.updates, self.steps = int(updates), int(steps)
        self.window = dict(zip(SEEN, sums, strict=True))
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[f"weight/{name}"])

    def _shared(self) -> bool:
        """Whether every rank holds the whole of the weights."""
        return not self.engine.collective

    def _file(self, folder: Path) -> Path:
        return folder / f"proposal_{0 if self._shared() else distributed.rank():05d}.safetensors"


def forward_kl(policy: Tensor, behavior: Tensor, target: Tensor) -> Tensor:
    """KL(p ‖ π) of each prompt by samples of q, Σ_k p/q log p/π / K; without bias, and so at times below 0.

    Args:
        policy, behavior, target: (B, K) log π(y_k|x), log q(y_k|x) and the normalised log p(y_k|x), nats; −∞ where the
            target excludes a response, which then counts for nothing.

    Returns:
        (B,) float64.
    """
    lacking = target - policy
    return torch.where(target == -torch.inf, 0.0, ratio(target, behavior).double() * lacking).mean(-1)
