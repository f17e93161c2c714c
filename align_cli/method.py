"""What is computed on a micro-batch: columns, the policy's own, the loss of them, and the figures that are logged."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from align_cli import columns, distributed
from align_cli.data.batches import MicroBatch, Minibatch, flatten
from align_cli.data.store import Group
from align_cli.engine import Engine, Measuring
from align_cli.experiment import Experiment
from align_cli.metrics import (
    Metrics,
    approximation,
    contrast,
    critic,
    disagreement,
    likelihood,
    moments,
    objective,
    preference,
    ranking,
    sampled,
    update,
)
from align_cli.models.causal import Manner, measure, read_architecture
from align_cli.models.scalar import is_reward_model
from align_cli.references import MismatchKL
from align_cli.reinforcement import Scaled, TokenRewards


@dataclass
class Meter:
    """Sums and counts of a step's figures, over micro-batches and then over ranks; divided once."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, metrics: Metrics) -> None:
        """Add a micro-batch's figures, a (sum, count) for each name."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.detach().double(), count.detach().double().to(total.device)])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def together(self) -> Tensor:
        """The sums and counts of all figures (figures, 2), in float64 on the device that some are on, else on the CPU.

        What is computed from the model lies on the device; a penalty's strength, for one, is a number of the CPU.
        """
        pairs = list(self.sums.values())
        where = next((pair.device for pair in pairs if pair.device.type != "cpu"), torch.device("cpu"))
        return torch.stack([pair.to(where) for pair in pairs])

    def read(self) -> dict[str, float]:
        """The means over the step's micro-batches and ranks; every rank calls it.

        An infinite divergence is not a figure; an infinite loss is, for the loop to stop at.
        """
        # One wait for the device and one exchange, however many figures; ranks may have different ones.
        mine = self.together().tolist() if self.sums else []
        means: dict[str, list[float]] = {}
        for names, pairs in distributed.gather((list(self.sums), mine)):
            for name, (total, count) in zip(names, pairs, strict=True):
                so_far = means.setdefault(name, [0.0, 0.0])
                so_far[0] += total
                so_far[1] += count
        known = {name: total / count for name, (total, count) in means.items() if count > 0}
        return {name: mean for name, mean in known.items() if name == "loss" or not math.isinf(mean)}


@dataclass(frozen=True)
class Method:
    """What is computed on a micro-batch: the loss, the columns it needs, and who makes them."""

    experiment: Experiment
    producers: Mapping[str, columns.Column]
    made: tuple[str, ...]

    @torch.no_grad()
    def columns(self, engine: Measuring, batches: Sequence[MicroBatch]) -> list[dict[str, Any]]:
        """The columns of each micro-batch of a step, without the policy's own; every rank calls it.

        They are made one by one for the whole step, so that a producer may look at all of it.
        """
        filled: list[dict[str, Any]] = []
        for batch in batches:
            batch = batch.to(engine.device)
            given = {"ratings": batch.ratings, "lengths": batch.lengths, "mask": batch.mask(), "batch": batch}
            if batch.behavior is not None:
                given |= {"behavior_tokens": batch.behavior, "behavior": batch.behavior.sum(-1)}
            if self.experiment.remembers:
                again = remembered(engine.measure(batch))
                # Where samples are another policy's, only what the critic expects of them is its own.
                given |= again if self.experiment.on_policy else {"old_values": again["old_values"]}
            filled.append(given | batch.given)
        for name in self.made:
            if isinstance(producer := self.producers[name], columns.Gathers):
                producer.gather(filled)
            for each in filled:
                each[name] = columns.evaluate(self.producers[name], each)
        return filled

    def measured(self, engine: Measuring, filled: Mapping[str, Any]) -> dict[str, Any]:
        """All columns of a micro-batch, the policy's with gradient.

        Responses that were sampled for the only update of this step come from the policy as it is: their probability
        under it then is the one that the loss sees, to the last bit.
        """
        now = engine.measure(filled["batch"])
        if "behavior" in filled and self.experiment.on_policy and not self.experiment.remembers:
            return {**filled, **now, **remembered(now)}
        return {**filled, **now}

    def elements(self, filled: Mapping[str, Any]) -> Tensor:
        """The loss of each prompt (B,) or of each response token (B, K, T)."""
        return columns.evaluate(self.experiment.loss, filled)

    def begin(self, groups: Iterable[Group]) -> None:
        """What must be known of a whole step before its first micro-batch; every rank calls it."""
        for name in self.made:
            producer = self.producers[name]
            if isinstance(producer, MismatchKL):
                producer.begin(list(groups))

    def count(self, minibatch: Minibatch) -> int:
        """What the loss of an update is divided by: its prompts, or its response tokens."""
        return minibatch.response_tokens if self.experiment.per_token else len(minibatch.groups)

    def size(self, filled: Mapping[str, Any]) -> Tensor:
        """A micro-batch's share of `count`."""
        if self.experiment.per_token:
            return filled["lengths"].sum()
        return torch.tensor(len(filled["lengths"]))

    @torch.no_grad()
    def first(self, engine: Engine, filled: Mapping[str, Any]) -> Metrics:
        """What the first step is judged by, before the first update.

        With a reference, `exact` is the closed form of the loss while policy and reference are the same, `start` the
        loss with the policy in the reference's place, and `drift` how far the two are apart, in nats per token. In
        fp32 the loss itself is held to `exact`. Below fp32 a reference that was measured in another micro-batch
        differs by rounding, which a steep loss multiplies; then `start` is held to it, and `drift` to rounding.

        Without a reference, `plain` is the loss of log-probabilities that are computed the plain way, a padded
        sequence for each response, and `start` the loss that is held to it; below fp32 they differ by rounding. Both
        are of the micro-batch's shortest group: padded, all of it could need many times its memory.

        A reward model starts without preferences: `exact` is the loss of scores that are all 0. Of one that is trained
        further, `plain` and `start` are the losses of scores.

        Sampled responses are judged by `drift` and by `sampler`, how far the sampler's log-probabilities are from the
        policy's.
        """
        size = self.size(filled)
        if "behavior" in filled:
            others = {"sampler": filled["batch"].behavior.sum(-1)} if self.experiment.starts_on_policy else {}
            others |= {} if self.experiment.reference.path else {"drift": filled["reference"]}
            return {name: self._apart(filled, other) for name, other in others.items()}
        if "scores" in filled and not is_reward_model(read_architecture(self.experiment.model)):
            started = {**filled, "scores": torch.zeros_like(filled["scores"])}
            return {"exact": (self.elements(started).sum(), size)}
        if self.experiment.at_reference is None:
            return self._plain(engine, filled)
        if self.experiment.reference.path:
            return {}
        exact = columns.evaluate(self.experiment.at_reference, filled)
        policy = filled["policy"].detach()
        start = self.elements({**filled, "policy": policy, "reference": policy})
        drift = self._apart(filled, filled["reference"])
        return {"exact": (exact.sum(), size), "start": (start.sum(), size), "drift": drift}

    def _plain(self, engine: Engine, filled: Mapping[str, Any]) -> Metrics:
        """`plain` and `start` of a micro-batch's shortest group."""
        groups = filled["batch"].groups
        tokens = [len(group.prompt) + sum(map(len, group.responses)) for group in groups]
        place = tokens.index(min(tokens))
        alone = flatten([groups[place]]).to(engine.device)
        found = measure(engine.module(), alone, Manner(flat=False, scalar=engine.manner.scalar))
        own = {name: column[place : place + 1] for name, column in filled.items() if isinstance(column, Tensor)}
        if "policy_tokens" in own:  # as long as the micro-batch's longest response
            missing = own["policy_tokens"].shape[-1] - found["policy_tokens"].shape[-1]
            found["policy_tokens"] = pad(found["policy_tokens"], (0, missing))
        size = self.size(own)
        return {"plain": (self.elements({**own, **found}).sum(), size), "start": (self.elements(own).sum(), size)}

    @staticmethod
    def _apart(filled: Mapping[str, Any], other: Tensor) -> tuple[Tensor, Tensor]:
        """How far (B, K) log-probabilities are from the policy's, nats per token; sum over prompts, and prompts."""
        apart = ((filled["policy"].detach() - other) / filled["lengths"]).abs().mean(-1)
        return apart.sum(), torch.tensor(len(apart))

    def metrics(self, filled: Mapping[str, Any]) -> Metrics:
        """The figures that are logged beside the loss."""
        if "scores" in filled:
            return ranking(filled["scores"], filled["pairs"])
        if "behavior" in filled:
            return self._of_samples(filled)
        if "reference" not in filled:
            return likelihood(filled["policy"], filled["ratings"], filled["lengths"])
        return preference(
            filled["policy"], filled["reference"], filled["ratings"], filled["lengths"], beta=self.experiment.beta
        )

    def _of_samples(self, filled: Mapping[str, Any]) -> Metrics:
        found = sampled(filled["policy"], filled["reference"], filled["ratings"], filled["lengths"])
        if "target" in filled:
            found |= approximation(filled["policy"], filled["behavior"], filled["target"], filled["log_z"])
        if self.experiment.moments is not None:
            found |= moments(filled["features"], names=list(self.experiment.moments.features))
        if "spread" in filled:
            found |= disagreement(filled["spread"])
        if "advantages" in filled:
            if "policy" in columns.asked(self.experiment.loss):  # it clips the ratio of whole responses
                ratios = (filled["policy"][..., None], filled["behavior"][..., None])
                mask = torch.ones_like(ratios[0])
            else:
                ratios, mask = (filled["policy_tokens"], filled["behavior_tokens"]), filled["mask"]
            found |= update(*ratios, mask, clip=self.experiment.clip)
        if "token_rewards" in filled:
            found |= self._of_rewards(filled)
        if "returns" in filled:
            found |= critic(filled["values"], filled["returns"], filled["mask"])
        if "baselines" in filled:
            found |= contrast(filled["ratings"], filled["baselines"], filled["rewards"])
            if isinstance(scaled := self.producers["rewards"], Scaled):
                found["contrastive/lambda"] = (torch.tensor(scaled.scale), torch.tensor(1))
        return found

    def _of_rewards(self, filled: Mapping[str, Any]) -> Metrics:
        penalty = self.producers["token_rewards"]
        assert isinstance(penalty, TokenRewards)
        names = ("behavior_tokens", "reference_tokens", "ratings", "rewards", "mask")
        found = objective(*(filled[name] for name in names), beta=penalty.beta)
        return {**found, "objective/beta": (torch.tensor(penalty.beta), torch.tensor(1))}

    def state(self) -> dict[str, Any]:
        """What producers have learnt on the way, for a checkpoint."""
        return {name: maker.state() for name, maker in self.producers.items() if isinstance(maker, columns.Learns)}


def remembered(measured: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The policy's own columns as those of the policy that sampled, without gradient."""
    return {columns.REMEMBERED[name]: column.detach() for name, column in measured.items()}
