"""The parts of a run, put together: the policy in its engine, the makers of columns, the loss over them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from align_cli import distributed, paths, terminal
from align_cli.data.batches import members, steps_per_epoch
from align_cli.data.store import Group, Store
from align_cli.engine import (
    DeepSpeedEngine,
    Engine,
    Network,
    TorchEngine,
    deepspeed_config,
    keep_zero3_alive,
    settle_deepspeed,
)
from align_cli.errors import UserError
from align_cli.experiment import Experiment, producers
from align_cli.models import recompute
from align_cli.models.adapters import attach
from align_cli.models.causal import (
    Manner,
    Model,
    error_of,
    load_model,
    recompute_activations,
    takes_flat_rows,
)
from align_cli.models.head import Head, transform_of
from align_cli.references import AdapterOff, Cached, Frozen, MismatchKL, mismatched, numerics, rows
from align_cli.train import Method, total_steps

# Largest difference in nats per token between a flat row and padded sequences that rounding explains.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class Prepared:
    """What a run reads.

    Attributes:
        experiment: with paths that exist here.
        tokenizer: the model's.
        train, held_out: the tokenised data.
        problems: prompts whose responses a program can judge; None where there is no such program.
    """

    experiment: Experiment
    tokenizer: PreTrainedTokenizerBase
    train: Store
    held_out: Store
    problems: Path | None


def build_engine(experiment: Experiment, device: torch.device) -> Engine:
    """The policy on this rank, tested to give the same log-probabilities on flat rows as on padded sequences."""
    torch.manual_seed(experiment.run.seed)
    options = experiment.engine
    dtype = options.dtype(device)
    manner = Manner(flat=False)
    if options.stage is None:
        engine: Engine = TorchEngine(_network(experiment, dtype), device, manner=manner, optimizer=experiment.optimizer)
    else:
        settle_deepspeed(device)
        config = deepspeed_config(options, experiment.optimizer, device, alone=not experiment.frozen_reference)
        alive = keep_zero3_alive(config)
        network = _network(experiment, dtype)
        engine = DeepSpeedEngine(network, device, manner=manner, config=config, optimizer=experiment.optimizer)
        del alive
    manner = find_manner(
        engine.network, engine.module(), experiment.model, dtype=dtype, logits_mb=options.logits_mb, device=device
    )
    engine.manner = replace(manner, sparing=options.sparing)
    return engine


def find_manner(
    network: Network, module: nn.Module, model: Model, *, dtype: torch.dtype, logits_mb: int, device: torch.device
) -> Manner:
    """The fastest way to measure a model that agrees with its own code on padded sequences; every rank calls it.

    Args:
        network: the model.
        module: what a forward pass calls.
        dtype: of weights and activations.
        logits_mb: `engine.logits_mb`.
    """
    flat = model.rows != "padded" and takes_flat_rows(network.config)
    if model.rows in ("shared", "packed") and not flat:
        raise UserError(
            f"model.rows={model.rows}: {model.path} does not send its attention through transformers' interface. "
            "Use model.rows=auto or padded."
        )
    say = terminal.say if distributed.rank() == 0 else terminal.silent
    output: Any = network.get_output_embeddings()
    known = None
    if model.head == "auto" and isinstance(output, Head):
        known = transform_of(module, output, device)
    wanted = Manner(flat, model.rows != "packed", known, logits_mb * 1_000_000)
    ways = [wanted, replace(wanted, transform=None), replace(wanted, flat=False), Manner(flat=False)]
    vocabulary = int(network.config.vocab_size)
    for way in dict.fromkeys(ways):
        if way == Manner(flat=False):  # what all others are held against
            break
        error = max(distributed.gather(error_of(module, way, vocabulary, device)))
        head = "the model's own head" if way.transform is None else "the chunked head"
        told = f"{rows(way)} rows and {head} are {error:.2g} nats per token off the model's own code"
        if error <= ROUNDING[dtype]:
            say(f"self-test: {told}")
            break
        if model.rows in ("shared", "packed") and way.transform is None:
            raise UserError(f"model.rows={model.rows}: {told} under this architecture. Use model.rows=padded.")
        if distributed.rank() == 0:
            terminal.warn(f"{told}; this architecture is measured another way")
    return way


def _network(experiment: Experiment, dtype: torch.dtype) -> Network:
    base = load_model(experiment.model, dtype=dtype, bits=experiment.adapter.bits)
    network = attach(base, experiment.adapter, seed=experiment.run.seed)
    if experiment.engine.gradient_checkpointing:
        recompute_activations(base)
        if experiment.adapter.rank is not None:
            base.enable_input_require_grads()
    if experiment.engine.sparing:
        recompute.install(network)
    network.train()
    return network


def build_methods(
    prepared: Prepared, engine: Engine, device: torch.device, digest: str
) -> tuple[Method, Method, Cached | None]:
    """The loss with the makers of its columns, for training and for evaluation.

    A cached reference is filled now, under the starting weights; evaluation has it even where the loss has none, to
    tell how far the policy has moved.

    Args:
        digest: of the policy's starting weights.
    """
    experiment = prepared.experiment
    asked = "reference" in experiment.made
    reference, cache = None, None
    if experiment.reference.name == "cached":
        reference = cache = open_cache(experiment, engine, digest)
        fill(cache, prepared, engine, everything=False)
    elif asked and experiment.reference.name == "frozen":
        reference = _frozen(experiment, engine, device)
    elif asked:
        reference = AdapterOff(engine)
    if reference is None:
        method = Method(experiment, producers(experiment), experiment.made)
        return method, method, None
    mismatch = MismatchKL(engine, reference, budget=experiment.engine.micro_tokens)
    makers = producers(experiment) | {"reference": reference, "mismatch_kl": mismatch}
    seen = experiment.made if asked else (*experiment.made, "reference")
    return Method(experiment, makers, experiment.made), Method(experiment, makers, seen), cache


def open_cache(experiment: Experiment, engine: Engine, digest: str) -> Cached:
    """The figures of these weights under this engine's numerics; every rank calls it.

    Args:
        digest: of the policy's starting weights.
    """
    dtype, bits = experiment.engine.dtype(engine.device), experiment.adapter.bits
    told = numerics(dtype=dtype, bits=bits, manner=engine.manner, device=engine.device)
    origin = {
        "model": experiment.model.path,
        "revision": experiment.model.revision,
        "weights": digest,
        "numerics": told,
        "dtype": str(dtype).removeprefix("torch."),
        "bits": bits,
        "rows": rows(engine.manner),
        "head": "plain" if engine.manner.transform is None else "auto",
        "device": engine.device.type,
        "matmul": torch.get_float32_matmul_precision(),
    }
    return Cached(Cached.home(paths.cache(), digest, told), origin)


def fill(cache: Cached, prepared: Prepared, engine: Engine, *, everything: bool) -> None:
    """Have the reference of what a run will look up: its steps, its evaluations, and KTO's mismatched pairs.

    Args:
        everything: also what neither is trained on nor evaluated in this run.
    """
    experiment, train, held_out = prepared.experiment, prepared.train, prepared.held_out
    budget = experiment.engine.micro_tokens
    say = terminal.say if distributed.rank() == 0 else terminal.silent
    asked = "reference" in experiment.made
    evaluated = len(held_out) if everything else min(experiment.eval.groups, len(held_out))
    if asked:
        trained = np.arange(len(train)) if everything else _groups_of_steps(experiment, train)
        cache.fill_store(engine, train, trained, budget=budget, say=say)
    cache.fill_store(engine, held_out, np.arange(evaluated), budget=budget, say=say)
    if "mismatch_kl" in experiment.made:
        cache.fill(engine, _pairs_of_steps(prepared), budget=budget, say=say)


def _groups_of_steps(experiment: Experiment, store: Store) -> NDArray[np.int64]:
    """The groups that a run's steps hold, in the order of the store."""
    of = total_steps(experiment.train, len(store))
    if of >= steps_per_epoch(len(store), experiment.train.prompts):
        return np.arange(len(store))
    return np.sort(np.concatenate([_members(experiment, store, step) for step in range(1, of + 1)]))


def _members(experiment: Experiment, store: Store, step: int) -> NDArray[np.int64]:
    train = experiment.train
    return members(store, step, prompts=train.prompts, seed=experiment.run.seed, together=train.together)


def _pairs_of_steps(prepared: Prepared) -> Iterator[Group]:
    """KTO's mismatched pairs, of each step and of the evaluation."""
    experiment, train, held_out = prepared.experiment, prepared.train, prepared.held_out
    for step in range(1, total_steps(experiment.train, len(train)) + 1):
        indices = _members(experiment, train, step).tolist()
        yield from mismatched([train[index] for index in indices])
    evaluated = [held_out[index] for index in range(min(experiment.eval.groups, len(held_out)))]
    if evaluated:
        yield from mismatched(evaluated)


def _frozen(experiment: Experiment, engine: Engine, device: torch.device) -> Frozen:
    """A second model beside the policy, on flat rows if its own architecture takes them."""
    model = experiment.model
    if experiment.reference.path is not None:
        model = replace(model, path=experiment.reference.path, revision=None)
    dtype = experiment.engine.dtype(device)
    network: nn.Module
    if experiment.engine.stage != 3:
        network = load_model(model, dtype=dtype, bits=experiment.adapter.bits).to(device).eval()  # pyright: ignore
    else:
        import deepspeed

        config = deepspeed_config(experiment.engine, experiment.optimizer, device, alone=False)
        alive = keep_zero3_alive(config)
        second = load_model(model, dtype=dtype, bits=None).eval()
        network, *_ = deepspeed.initialize(model=second, config=config, dist_init_required=False)
        del alive
    plain: Any = network if experiment.engine.stage != 3 else second
    logits_mb = experiment.engine.logits_mb
    return Frozen(network, find_manner(plain, network, model, dtype=dtype, logits_mb=logits_mb, device=device))
