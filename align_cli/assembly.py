"""The parts of a run, put together: the policy in its engine, the makers of columns, the loss over them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

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
from align_cli.models.adapters import attach
from align_cli.models.causal import (
    flat_rows_error,
    load_model,
    read_architecture,
    recompute_activations,
    takes_flat_rows,
)
from align_cli.references import AdapterOff, Cached, Frozen, MismatchKL, mismatched, numerics
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
    flat = experiment.model.rows != "padded" and takes_flat_rows(read_architecture(experiment.model))
    if experiment.model.rows == "shared" and not flat:
        raise UserError(
            f"model.rows=shared: {experiment.model.path} does not send its attention through transformers' interface. "
            "Use model.rows=auto or padded."
        )
    if options.stage is None:
        engine: Engine = TorchEngine(_network(experiment, dtype), device, flat=flat, optimizer=experiment.optimizer)
    else:
        settle_deepspeed(device)
        config = deepspeed_config(options, experiment.optimizer, device)
        alive = keep_zero3_alive(config)
        network = _network(experiment, dtype)
        engine = DeepSpeedEngine(network, device, flat=flat, config=config, optimizer=experiment.optimizer)
        del alive
    if flat:
        _test_flat_rows(experiment, engine, dtype)
    return engine


def _network(experiment: Experiment, dtype: torch.dtype) -> Network:
    base = load_model(experiment.model, dtype=dtype, bits=experiment.adapter.bits)
    network = attach(base, experiment.adapter, seed=experiment.run.seed)
    if experiment.engine.gradient_checkpointing:
        recompute_activations(base)
        if experiment.adapter.rank is not None:
            base.enable_input_require_grads()
    network.train()
    return network


def _test_flat_rows(experiment: Experiment, engine: Engine, dtype: torch.dtype) -> None:
    vocabulary = int(engine.network.config.vocab_size)
    error = max(distributed.gather(flat_rows_error(engine.module(), vocabulary, engine.device)))
    if error <= ROUNDING[dtype]:
        return
    found = f"flat rows and padded sequences differ by {error:.3g} nats per token"
    if experiment.model.rows == "shared":
        raise UserError(f"model.rows=shared: {found} under this architecture. Use model.rows=padded.")
    if distributed.rank() == 0:
        terminal.warn(f"{found}; this architecture gets a padded sequence for each response")
    engine.flat = False


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
    told = numerics(dtype=dtype, bits=bits, flat=engine.flat, device=engine.device)
    origin = {
        "model": experiment.model.path,
        "revision": experiment.model.revision,
        "weights": digest,
        "numerics": told,
        "dtype": str(dtype).removeprefix("torch."),
        "bits": bits,
        "rows": "shared" if engine.flat else "padded",
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
        trained = np.arange(len(train)) if everything else _groups_of_steps(experiment, len(train))
        cache.fill_store(engine, train, trained, budget=budget, say=say)
    cache.fill_store(engine, held_out, np.arange(evaluated), budget=budget, say=say)
    if "mismatch_kl" in experiment.made:
        cache.fill(engine, _pairs_of_steps(prepared), budget=budget, say=say)


def _groups_of_steps(experiment: Experiment, groups: int) -> NDArray[np.int64]:
    """The groups that a run's steps hold, in the order of the store."""
    prompts, seed = experiment.train.prompts, experiment.run.seed
    of = total_steps(experiment.train, groups)
    if of >= steps_per_epoch(groups, prompts):
        return np.arange(groups)
    chosen = [members(groups, step, prompts=prompts, seed=seed) for step in range(1, of + 1)]
    return np.sort(np.concatenate(chosen))


def _pairs_of_steps(prepared: Prepared) -> Iterator[Group]:
    """KTO's mismatched pairs, of each step and of the evaluation."""
    experiment, train, held_out = prepared.experiment, prepared.train, prepared.held_out
    prompts, seed = experiment.train.prompts, experiment.run.seed
    for step in range(1, total_steps(experiment.train, len(train)) + 1):
        indices = members(len(train), step, prompts=prompts, seed=seed).tolist()
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
        vocabulary = int(network.config.vocab_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    else:
        import deepspeed

        config = deepspeed_config(experiment.engine, experiment.optimizer, device)
        alive = keep_zero3_alive(config)
        second = load_model(model, dtype=dtype, bits=None).eval()
        vocabulary = int(second.config.vocab_size)
        network, *_ = deepspeed.initialize(model=second, config=config, dist_init_required=False)
        del alive
    flat = model.rows != "padded" and takes_flat_rows(read_architecture(model))
    if flat:
        flat = max(distributed.gather(flat_rows_error(network, vocabulary, device))) <= ROUNDING[dtype]
    return Frozen(network, flat=flat)
