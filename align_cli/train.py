"""The loop: draw a step, fill its columns, measure the policy, evaluate the loss, update.

source -> columns -> policy log-probabilities -> loss -> / global count -> step
"""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align_cli import columns, distributed
from align_cli.checkpoints import Checkpoints
from align_cli.data.batches import Measured, MicroBatch, Minibatch, Step, split, steps_per_epoch
from align_cli.data.store import Group, Store
from align_cli.engine import Engine
from align_cli.errors import RunError, Stopped
from align_cli.experiment import Experiment, Train
from align_cli.metrics import (
    Metrics,
    approximation,
    contrast,
    critic,
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
from align_cli.normaliser import LogZ
from align_cli.references import MismatchKL
from align_cli.reinforcement import Scaled, TokenRewards
from align_cli.sources import EVALUATION, Sampler, Source
from align_cli.statistics import clustered_proportion, mean_interval
from align_cli.tracking import Silent

TOLERANCE = 1e-3  # of the first step's loss
DRIFT = 0.05  # nats per token that bf16 may put between two measurements of one model; two models differ by more
REMEDY = "A lower train.lr, engine.precision=fp32 or smaller rewards may help; checkpoints of earlier steps are whole."


class WrongStart(RunError):
    """The first step's loss is not what it must be."""


class NotFinite(RunError):
    """The loss or its gradient is no number."""


@dataclass
class Meter:
    """Sums and counts of a step's figures, over micro-batches and then over ranks; divided once."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, metrics: Metrics) -> None:
        """Add a micro-batch's figures, a (sum, count) for each name."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.detach().double(), count.detach().double().to(total.device)])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def read(self) -> dict[str, float]:
        """The means over the step's micro-batches and ranks; every rank calls it."""
        # One wait for the device and one exchange, however many figures; ranks may have different ones.
        mine = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        means: dict[str, list[float]] = {}
        for names, pairs in distributed.gather((list(self.sums), mine)):
            for name, (total, count) in zip(names, pairs, strict=True):
                so_far = means.setdefault(name, [0.0, 0.0])
                so_far[0] += total
                so_far[1] += count
        return {name: total / count for name, (total, count) in means.items() if count > 0}


@dataclass(frozen=True)
class Method:
    """What is computed on a micro-batch: the loss, the columns it needs, and who makes them."""

    experiment: Experiment
    producers: Mapping[str, columns.Column]
    made: tuple[str, ...]

    @torch.no_grad()
    def columns(self, engine: Engine, batches: Sequence[MicroBatch]) -> list[dict[str, Any]]:
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
                given |= remembered(engine.measure(batch))
            filled.append(given | batch.given)
        for name in self.made:
            if isinstance(producer := self.producers[name], columns.Gathers):
                producer.gather(filled)
            for each in filled:
                each[name] = columns.evaluate(self.producers[name], each)
        return filled

    def measured(self, engine: Engine, filled: Mapping[str, Any]) -> dict[str, Any]:
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
        """What the first step is judged by: `exact`, `start` and `drift`, before the first update.

        With a reference, `exact` is the closed form of the loss while policy and reference are the same, `start` the
        loss with the policy in the reference's place, and `drift` how far the two are apart, in nats per token. In
        fp32 the loss itself is held to `exact`. Below fp32 a reference that was measured in another micro-batch
        differs by rounding, which a steep loss multiplies; then `start` is held to it, and `drift` to rounding.

        Without a reference, `exact` is the loss of log-probabilities that are computed the plain way, a padded
        sequence for each response.

        A reward model starts without preferences: `exact` is the loss of scores that are all 0. One that is trained
        further is held to scores that are computed the plain way.

        Sampled responses are judged by `drift` alone: how far the sampler's log-probabilities are from the policy's.
        """
        size = self.size(filled)
        if "behavior" in filled:
            sampler = filled["batch"].behavior.sum(-1)
            drift = ((filled["policy"].detach() - sampler) / filled["lengths"]).abs().mean(-1)
            return {"drift": (drift.sum(), size)} if self.experiment.on_policy else {}
        if "scores" in filled and not is_reward_model(read_architecture(self.experiment.model)):
            started = {**filled, "scores": torch.zeros_like(filled["scores"])}
            return {"exact": (self.elements(started).sum(), size)}
        if self.experiment.at_reference is None:
            plain = measure(engine.module(), filled["batch"], Manner(flat=False, scalar=engine.manner.scalar))
            return {"exact": (self.elements({**filled, **plain}).sum(), size)}
        if self.experiment.reference.path:
            return {}
        exact = columns.evaluate(self.experiment.at_reference, filled)
        policy = filled["policy"].detach()
        start = self.elements({**filled, "policy": policy, "reference": policy})
        drift = ((policy - filled["reference"]) / filled["lengths"]).abs().mean(-1)
        return {"exact": (exact.sum(), size), "start": (start.sum(), size), "drift": (drift.sum(), size)}

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
            found |= approximation(filled["policy"], filled["target"], filled["log_z"])
        if self.experiment.moments is not None:
            found |= moments(filled["features"], names=list(self.experiment.moments.features))
        if "advantages" in filled:
            tokens = (filled["policy_tokens"], filled["behavior_tokens"], filled["mask"])
            found |= update(*tokens, clip=float(self.experiment.tree["algo"]["clip"]))
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


def total_steps(train: Train, groups: int) -> int:
    """Optimizer steps of the whole run."""
    return train.steps if train.steps is not None else train.epochs * steps_per_epoch(groups, train.prompts)


def learning_rate(step: int, of: int, train: Train) -> float:
    """The rate of optimizer step `step`, counted from 1: a linear warm-up, then the schedule down to 0 at the end."""
    warmup = math.ceil(train.warmup_ratio * of)
    if step <= warmup:
        return train.lr * step / warmup
    if train.schedule == "constant":
        return train.lr
    left = (of - step + 1) / (of - warmup)
    return train.lr * (left if train.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


@dataclass
class Progress:
    """Where a run stands; it travels with the checkpoints, so that a resumed run reports the whole of it.

    Attributes:
        step: optimizer steps done.
        seconds: time in steps, without evaluation and saving.
        spent: the same by kind of work: train, and what a source does.
        groups, tokens: what went through the steps, over all ranks; tokens of prompts count once.
        first_loss, last_loss: of the first and the last logged step.
        before: evaluation before the first step.
        inputs: digests of the data and of the starting weights.
        precision: how matrices are multiplied (`align_cli.precision.Arithmetic`).
        columns: what the makers of columns have learnt (`Method.state`).
    """

    step: int = 0
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    groups: int = 0
    tokens: int = 0
    first_loss: float = math.nan
    last_loss: float = math.nan
    before: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    precision: dict[str, str] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)


def train(
    engine: Engine,
    method: Method,
    evaluation: Callable[[], dict[str, float]],
    source: Source,
    store: Store,
    *,
    progress: Progress,
    checkpoints: Checkpoints,
    tracker: Silent,
    stop: Callable[[], bool],
) -> None:
    """Run the steps that are left, logging, evaluating and saving as the experiment says; every rank calls it.

    Raises:
        Stopped: `stop` was true on some rank; the run has saved.
        WrongStart: the first step's loss is not the exact one.
        NotFinite: the loss or its gradient is not finite; what was saved is untouched.
    """
    experiment = method.experiment
    of = total_steps(experiment.train, len(store))
    precise = experiment.engine.dtype(engine.device) == torch.float32
    norms: dict[int, Tensor] = {}  # of gradients, not looked at yet
    plan = source.steps(progress.step + 1, of)
    while True:
        begun = time.perf_counter()
        step = next(plan, None)  # a rollout is part of its step
        if step is None:
            return
        logged = step.number in (1, of) or step.number % experiment.track.every == 0
        lr = learning_rate(step.number, of, experiment.train)
        meter, norms[step.number] = run_step(engine, method, step, lr, logged=logged)
        progress.step = step.number
        progress.groups += len(step.groups)
        progress.tokens += step.tokens
        figures = meter.read() if logged else {}
        seconds = time.perf_counter() - begun
        spent = {**step.seconds, "train": seconds - sum(step.seconds.values())}
        progress.seconds += seconds
        progress.spent = {name: progress.spent.get(name, 0.0) + spent[name] for name in spent}
        if logged:
            _judge(step.number, figures, precise)
            progress.last_loss = figures["loss"]
            if step.number == 1:
                progress.first_loss = figures["loss"]
            figures |= {"learning_rate": lr, "grad_norm": _finite(norms), "epoch": progress.groups / len(store)}
            if step.seconds:
                figures |= {f"seconds/{name}": value for name, value in spent.items()}
        if experiment.eval.every is not None and step.number % experiment.eval.every == 0 and step.number < of:
            figures |= {f"eval/{name}": value for name, value in evaluation().items()}
        if figures:
            tracker.log(step.number, figures)
        tracker.progress(step.number, progress.tokens / progress.seconds, progress.last_loss)
        asked_to_stop = distributed.any_rank(stop())
        if asked_to_stop or step.number == of or step.number % experiment.checkpoint.every == 0:
            _finite(norms)
            progress.columns = method.state()
            with checkpoints.saving(step.number, asdict(progress)) as folder:
                engine.save(folder)
        if asked_to_stop and step.number < of:
            raise Stopped(f"stopped by a signal after step {step.number} of {of}")


def run_step(engine: Engine, method: Method, step: Step, lr: float, *, logged: bool) -> tuple[Meter, Tensor]:
    """Update the weights from a step, once for each entry of its order.

    Returns:
        The step's figures, over all updates, none where they are not logged; the largest norm of a gradient, ().
    """
    meter = Meter()
    method.begin(step.store[index] for index in step.groups)
    rows = [
        [engine.manner.flatten([step.store[index] for index in p.groups], counted=p.counted) for p in minibatch.parts]
        for minibatch in step.minibatches
    ]
    filled = iter(method.columns(engine, [batch for batches in rows for batch in batches]))
    columns_of = [list(islice(filled, len(batches))) for batches in rows]
    norms: list[Tensor] = []
    for number in step.order:
        count = method.count(step.minibatches[number])
        for known in columns_of[number]:
            seen, counted = method.measured(engine, known), known["batch"].counted
            elements = method.elements(seen)
            engine.backward(elements.sum() * float(counted) / count)
            first = method.first(engine, seen) if step.number == 1 and not norms else {}
            if counted and logged:
                with torch.no_grad():
                    meter.add({"loss": (elements.sum(), method.size(seen))} | method.metrics(seen) | first)
        norms.append(engine.step(lr))
    return meter, torch.stack(norms).max()


def _finite(norms: dict[int, Tensor]) -> float:
    """Look at the norms of some steps' gradients and forget them; returns the last.

    Steps do not wait for the device to look at theirs, but no checkpoint may hold weights that are no numbers.
    """
    found = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}
    norms.clear()
    for step, norm in found.items():
        if not (math.isfinite(norm) and norm >= 0):  # DeepSpeed says -1
            raise NotFinite(f"the gradient of step {step} is not finite. {REMEDY}")
    return next(reversed(found.values()), math.nan)


def _judge(step: int, figures: dict[str, float], precise: bool) -> None:
    """Hold the loss against what is known of it; what only judges the first step is taken out of the figures."""
    loss = figures["loss"]
    if not math.isfinite(loss):
        raise NotFinite(f"the loss of step {step} is {loss}. {REMEDY}")
    exact, start, drift = (figures.pop(name, None) for name in ("exact", "start", "drift"))
    limit = TOLERANCE if precise else DRIFT
    if exact is None and drift is not None and drift > limit:
        raise WrongStart(
            f"the sampler's log-probabilities are {drift:.3g} nats per token off the policy's, more than rounding. "
            "Likely causes: dropout or another random part is active; the model generates otherwise than it is trained."
        )
    if exact is None:
        return
    held = loss if precise or start is None else start
    apart = drift is not None and drift > limit
    if abs(held - exact) > TOLERANCE or apart:
        told = f"; policy and reference are {drift:.3g} nats per token apart" if apart else ""
        raise WrongStart(
            f"the first loss is {held:.6f}; before any update it must be {exact:.6f}{told}. Likely causes: the "
            "reference is not the policy's starting weights; dropout or another random part is active; "
            "log-probabilities are rounded to bf16 on the way; adapters do not start at zero; the cached reference "
            "belongs to other numerics (remove it from the cache folder)."
        )


@torch.no_grad()
def evaluate_loss(engine: Engine, method: Method, store: Store) -> dict[str, float]:
    """The loss and all metrics on the first `eval.groups` held-out groups; every rank calls it."""
    experiment = method.experiment
    chosen = tuple(range(min(experiment.eval.groups, len(store))))
    if not chosen:
        return {}
    parts = split(
        chosen, engine.manner.lengths(store), ranks=distributed.world(), budget=experiment.engine.micro_tokens
    )
    method.begin(store[index] for index in chosen)
    meter = Meter()
    for part in parts[distributed.rank()]:
        batch = engine.manner.flatten([store[index] for index in part.groups], counted=part.counted)
        (columns_of,) = method.columns(engine, [batch])
        filled = method.measured(engine, columns_of)
        if part.counted:
            meter.add({"loss": (method.elements(filled).sum(), method.size(filled))} | method.metrics(filled))
    return meter.read()


@torch.no_grad()
def evaluate_samples(engine: Engine, method: Method, sampler: Sampler, prompts: Store) -> dict[str, float]:
    """What responses to the first `eval.groups` held-out prompts are like, sampled `eval.samples` times each.

    Every rank calls it.

    Returns:
        `alignment`, the mean rating, with `_low` and `_high` of its 95 % interval, prompts being the independent
        observations; `moment/<feature>`, the same of a target's features; and the step's figures
        (`align_cli.metrics`). A target's Z is estimated anew, from these samples.
    """
    experiment = method.experiment
    asked = [prompts[index] for index in range(min(experiment.eval.groups, len(prompts)))]
    if not asked:
        return {}
    seed = (experiment.run.seed, EVALUATION)
    temperature = None if experiment.tempered else 1.0
    drawn = sampler.draw(asked, seed, samples=experiment.eval.samples, temperature=temperature)
    sampler.spent.clear()
    apart = replace(method, producers={**method.producers, "log_z": LogZ(experiment.normaliser)})
    places = range(len(drawn))
    lengths = engine.manner.lengths(Measured.of(drawn))
    parts = split(places, lengths, ranks=distributed.world(), budget=experiment.engine.micro_tokens)
    mine = parts[distributed.rank()]
    batches = [engine.manner.flatten([drawn[index] for index in p.groups], counted=p.counted) for p in mine]
    meter = Meter()
    for columns_of in apart.columns(engine, batches):
        filled = apart.measured(engine, columns_of)
        if columns_of["batch"].counted:
            meter.add(apart.metrics(filled))
    told = _mean("alignment", [group.ratings for group in drawn])
    names = () if experiment.moments is None else experiment.moments.features
    for place, name in enumerate(names):
        told |= _mean(f"moment/{name}", [group.given["features"][:, place] for group in drawn])
    return told | meter.read()


def _mean(name: str, scores: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """The mean score under `name`, with its bounds; a row of scores for each prompt."""
    means = [float(each.mean(dtype=np.float64)) for each in scores]
    binary = all(score in (0.0, 1.0) for each in scores for score in each.tolist())
    interval = clustered_proportion(means) if binary else mean_interval(means)
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and SIGINT raise a flag, which the yielded function reads; a second SIGINT kills."""
    raised: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        raised.append(number)
        if raised.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(raised)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
