"""The loop: draw a step, fill its columns, measure the policy, evaluate the loss, update.

source -> columns -> policy log-probabilities -> loss -> / global count -> step
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from align_cli import distributed, exits, terminal
from align_cli.checkpoints import Checkpoints
from align_cli.data.batches import Step, steps_per_epoch
from align_cli.data.store import Store
from align_cli.engine import Engine
from align_cli.errors import RunError, Stopped
from align_cli.method import Meter, Method
from align_cli.proposal import Proposal
from align_cli.raters import Alike
from align_cli.sections import Train
from align_cli.sources import FromPolicy, Source
from align_cli.tracking import Silent

TOLERANCE = 1e-3  # of the first step's loss; where its exact value is above 1, as with a small α or β, a share of it
# What bf16 may put between two measurements of one model, in nats per token or of a loss; two models differ by more.
DRIFT = 0.05
REMEDY = "A lower train.lr, engine.precision=fp32 or smaller rewards may help; checkpoints of earlier steps are whole."


WHERE_EXCLUDED = (
    "divergence=js, tv, forward_kl, hellinger, alpha and forward_chi2 are finite there, the others are not."
)


class WrongStart(RunError):
    """The first step's loss is not what it must be."""


class NotFinite(RunError):
    """The loss or its gradient is not a number."""


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
        unrated: groups that steps went without, because responses to them could not be rated.
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
    unrated: int = 0
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
    proposal: Proposal | None,
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
    ratings, whole = Alike(), progress.step == 0
    plan = source.steps(progress.step + 1, of)
    while True:
        begun = time.perf_counter()
        step = next(plan, None)  # a rollout is part of its step
        if step is None:
            return
        logged = step.number in (1, of) or step.number % experiment.track.every == 0
        lr = learning_rate(step.number, of, experiment.train)
        meter, norms[step.number] = run_step(engine, method, step, lr, proposal=proposal, logged=logged)
        progress.step = step.number
        progress.groups += len(step.groups)
        progress.tokens += step.tokens
        progress.unrated += step.unrated
        if isinstance(experiment.source, FromPolicy):
            ratings.add(step.store[index] for index in step.groups)
            seen = step.number == 1 or (step.number == of and whole)  # else what a resumed run saw is no sign
            against = ratings.doubt() if seen else None
            if against is not None and distributed.rank() == 0:
                terminal.warn(against)
        figures = meter.read() if logged else {}
        renewed = {} if proposal is None else proposal.settle()
        figures |= renewed if logged else {}
        seconds = time.perf_counter() - begun
        spent = {**step.seconds, "train": seconds - sum(step.seconds.values())}
        progress.seconds += seconds
        progress.spent = {name: progress.spent.get(name, 0.0) + spent[name] for name in spent}
        if logged:
            _judge(step.number, figures, precise)
            progress.last_loss = figures["loss"]
            if step.number == 1:
                progress.first_loss = figures["loss"]
            epoch = (progress.groups + progress.unrated) / len(store)
            figures |= {"learning_rate": lr, "grad_norm": _finite(norms), "epoch": epoch}
            if isinstance(experiment.source, FromPolicy):
                figures["rollout/unrated"] = progress.unrated
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
            tracker.keep()
            with checkpoints.saving(step.number, asdict(progress)) as folder:
                engine.save(folder)
                if proposal is not None:
                    proposal.save(folder)
        if asked_to_stop and step.number < of:
            told = f"stopped by a signal after step {step.number} of {of}"
            raise Stopped(told, f"the same command with run.dir={experiment.run.dir}")


def run_step(
    engine: Engine, method: Method, step: Step, lr: float, *, proposal: Proposal | None = None, logged: bool
) -> tuple[Meter, Tensor]:
    """Update the weights from a step, once for each entry of its order.

    Args:
        proposal: what the step was drawn from; it sees the samples before they are learned from.

    Returns:
        The step's figures, over all updates, none where they are not logged; the largest norm of a gradient, (), or NaN
        where one was not finite.
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
    for place, number in enumerate(step.order):
        fresh = number not in step.order[:place]
        count = method.count(step.minibatches[number])
        for known in columns_of[number]:
            seen, counted = method.measured(engine, known), known["batch"].counted
            elements = method.elements(seen)
            engine.backward(elements.sum() * float(counted) / count)
            first = method.first(engine, seen) if step.number == 1 and not norms else {}
            if counted and fresh and proposal is not None:
                proposal.see(seen)
            if counted and logged:
                with torch.no_grad():
                    meter.add({"loss": (elements.sum(), method.size(seen))} | method.metrics(seen) | first)
        norms.append(engine.step(lr))
    found = torch.stack(norms)
    return meter, torch.where(found < 0, torch.nan, found).max()  # DeepSpeed says -1 of what is not finite


def _finite(norms: dict[int, Tensor]) -> float:
    """Look at the norms of some steps' gradients and forget them; returns the last.

    Steps do not wait for the device to look at theirs, but no checkpoint may hold weights that are not numbers.
    """
    found = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}
    norms.clear()
    for step, norm in found.items():
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient of step {step} is not finite. {REMEDY}")
    return next(reversed(found.values()), math.nan)


def _judge(step: int, figures: dict[str, float], precise: bool) -> None:
    """Hold the loss against what is known of it; what only judges the first step is taken out of the figures."""
    loss = figures["loss"]
    if not math.isfinite(loss):
        excluded = figures.get("divergence/excluded")
        forbidden = f"The target excludes {excluded:.0%} of the samples; {WHERE_EXCLUDED} " if excluded else ""
        raise NotFinite(f"the loss of step {step} is {loss}. {forbidden}{REMEDY}")
    judged = ("exact", "plain", "start", "drift", "sampler")
    exact, plain, start, drift, sampler = (figures.pop(name, None) for name in judged)
    limit = TOLERANCE if precise else DRIFT
    if sampler is not None and sampler > limit:
        raise WrongStart(
            f"the sampler's log-probabilities are {sampler:.3g} nats per token off the policy's, more than rounding. "
            "Likely causes: dropout or another random part is active; the model generates otherwise than it is trained."
        )
    if exact is None and drift is not None and drift > limit:
        raise WrongStart(
            f"policy and reference are {drift:.3g} nats per token apart before any update, more than rounding. Likely "
            "causes: the reference is not the policy's starting weights; adapters do not start at zero."
        )
    right, within = (exact, TOLERANCE * max(1.0, abs(exact or 0.0))) if plain is None else (plain, limit)
    if right is None:
        return
    held = loss if start is None or (precise and plain is None) else start
    apart = drift is not None and drift > limit
    if abs(held - right) > within or apart:
        told = f"; policy and reference are {drift:.3g} nats per token apart" if apart else ""
        raise WrongStart(
            f"the first loss is {held:.6f}; before any update it must be {right:.6f}{told}. Likely causes: the "
            "reference is not the policy's starting weights; dropout or another random part is active; "
            "log-probabilities are rounded to bf16 on the way; adapters do not start at zero; the cached reference "
            "belongs to other numerics (`align cache verify` measures a sample of it again)."
        )


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block a signal to stop raises a flag, which the yielded function reads; a second SIGINT kills."""
    raised: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        raised.append(number)
        if raised.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in exits.stopping()}
    try:
        yield lambda: bool(raised)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
