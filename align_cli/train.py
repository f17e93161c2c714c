"""The loop: draw a step, fill its columns, measure the policy, evaluate the loss, update.

source -> columns -> policy log-probabilities -> loss -> / global count -> step
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from align_cli import columns, distributed
from align_cli.checkpoints import Checkpoints
from align_cli.data.batches import MicroBatch, Step, split, steps, steps_per_epoch
from align_cli.data.store import Store
from align_cli.engine import Engine
from align_cli.errors import RunError, Stopped
from align_cli.experiment import Experiment, Train
from align_cli.metrics import Metrics, likelihood, preference
from align_cli.models.causal import Manner, measure
from align_cli.references import MismatchKL
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

    def columns(self, engine: Engine, batch: MicroBatch) -> dict[str, Any]:
        """All columns of a micro-batch; only the policy's carry gradient."""
        batch = batch.to(engine.device)
        given = {"ratings": batch.ratings, "lengths": batch.lengths, "mask": batch.mask(), "batch": batch}
        with torch.no_grad():
            filled = columns.fill(given, self.made, self.producers)
        return filled | engine.measure(batch)

    def elements(self, filled: Mapping[str, Any]) -> Tensor:
        """The loss of each prompt (B,) or of each response token (B, K, T)."""
        return columns.evaluate(self.experiment.loss, filled)

    def begin(self, store: Store, groups: Sequence[int]) -> None:
        """What must be known of a whole step before its first micro-batch; every rank calls it."""
        for name in self.made:
            producer = self.producers[name]
            if isinstance(producer, MismatchKL):
                producer.begin([store[index] for index in groups])

    def count(self, store: Store, groups: Sequence[int]) -> int:
        """What the loss of a step is divided by: its prompts, or its response tokens."""
        if self.experiment.per_token:
            return int(store.response_tokens[list(groups)].sum())
        return len(groups)

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
        """
        size = self.size(filled)
        if self.experiment.at_reference is None:
            plain = measure(engine.module(), filled["batch"], Manner(flat=False))
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
        if "reference" not in filled:
            return likelihood(filled["policy"], filled["ratings"], filled["lengths"])
        return preference(
            filled["policy"], filled["reference"], filled["ratings"], filled["lengths"], beta=self.experiment.beta
        )


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
        groups, tokens: what went through the steps, over all ranks; tokens of prompts count once.
        first_loss, last_loss: of the first and the last logged step.
        before: evaluation before the first step.
        inputs: digests of the data and of the starting weights.
        precision: how matrices are multiplied (`align_cli.precision.Arithmetic`).
    """

    step: int = 0
    seconds: float = 0.0
    groups: int = 0
    tokens: int = 0
    first_loss: float = math.nan
    last_loss: float = math.nan
    before: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    precision: dict[str, str] = field(default_factory=dict)


def train(
    engine: Engine,
    method: Method,
    evaluation: Method,
    store: Store,
    held_out: Store,
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
    tokens = store.prompt_tokens + store.response_tokens
    precise = experiment.engine.dtype(engine.device) == torch.float32
    plan = steps(
        store,
        engine.manner.lengths(store),
        first=progress.step + 1,
        last=of,
        prompts=experiment.train.prompts,
        seed=experiment.run.seed,
        together=experiment.train.together,
        rank=distributed.rank(),
        ranks=distributed.world(),
        budget=experiment.engine.micro_tokens,
    )
    norms: dict[int, Tensor] = {}  # of gradients, not looked at yet
    for step in plan:
        begun = time.perf_counter()
        logged = step.number in (1, of) or step.number % experiment.track.every == 0
        meter = run_step(engine, method, store, step, logged=logged)
        lr = learning_rate(step.number, of, experiment.train)
        norms[step.number] = engine.step(lr)
        progress.step = step.number
        progress.groups += len(step.groups)
        progress.tokens += int(tokens[list(step.groups)].sum())
        figures = meter.read() if logged else {}
        progress.seconds += time.perf_counter() - begun
        if logged:
            _judge(step.number, figures, precise)
            progress.last_loss = figures["loss"]
            if step.number == 1:
                progress.first_loss = figures["loss"]
            figures |= {"learning_rate": lr, "grad_norm": _finite(norms), "epoch": progress.groups / len(store)}
        if experiment.eval.every is not None and step.number % experiment.eval.every == 0 and step.number < of:
            found = evaluate_loss(engine, evaluation, held_out)
            figures |= {f"eval/{name}": value for name, value in found.items()}
        if figures:
            tracker.log(step.number, figures)
        tracker.progress(step.number, progress.tokens / progress.seconds, progress.last_loss)
        asked_to_stop = distributed.any_rank(stop())
        if asked_to_stop or step.number == of or step.number % experiment.checkpoint.every == 0:
            _finite(norms)
            with checkpoints.saving(step.number, asdict(progress)) as folder:
                engine.save(folder)
        if asked_to_stop and step.number < of:
            raise Stopped(f"stopped by a signal after step {step.number} of {of}")


def run_step(engine: Engine, method: Method, store: Store, step: Step, *, logged: bool) -> Meter:
    """Put the gradient of one optimizer step into the engine; returns its figures, none where they are not logged."""
    meter = Meter()
    method.begin(store, step.groups)
    count = method.count(store, step.groups)
    for part in step.parts:
        batch = engine.manner.flatten([store[index] for index in part.groups], counted=part.counted)
        filled = method.columns(engine, batch)
        elements = method.elements(filled)
        engine.backward(elements.sum() * float(part.counted) / count)
        first = method.first(engine, filled) if step.number == 1 else {}
        if part.counted and logged:
            with torch.no_grad():
                meter.add({"loss": (elements.sum(), method.size(filled))} | method.metrics(filled) | first)
    return meter


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
    if exact is None:
        return
    held = loss if precise or start is None else start
    apart = drift is not None and drift > (TOLERANCE if precise else DRIFT)
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
    method.begin(store, chosen)
    meter = Meter()
    for part in parts[distributed.rank()]:
        filled = method.columns(engine, engine.manner.flatten([store[index] for index in part.groups]))
        if part.counted:
            meter.add({"loss": (method.elements(filled).sum(), method.size(filled))} | method.metrics(filled))
    return meter.read()


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
