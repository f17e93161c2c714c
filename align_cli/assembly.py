"""The parts of a run, put together: the policy in its engine, the makers of columns, the loss over them."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from align_cli import distributed, paths, terminal
from align_cli.data.batches import members
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
from align_cli.references import AdapterOff, Cached, Frozen, MismatchKL, mismatched
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
    budget = experiment.engine.micro_tokens
    reference, cache = None, None
    if experiment.reference.name == "cached":
        home = Cached.home(
            paths.cache(),
            digest,
            dtype=experiment.engine.dtype(device),
            flat=engine.flat,
            bits=experiment.adapter.bits,
        )
        reference = cache = Cached(home)
        wanted = _groups_to_score(prepared, asked)
        cache.fill(engine, wanted, budget=budget, say=terminal.say if distributed.rank() == 0 else terminal.silent)
    elif asked and experiment.reference.name == "frozen":
        reference = _frozen(experiment, engine, device)
    elif asked:
        reference = AdapterOff(engine)
    if reference is None:
        method = Method(experiment, producers(experiment), experiment.made)
        return method, method, None
    mismatch = MismatchKL(engine, reference, budget=budget)
    makers = producers(experiment) | {"reference": reference, "mismatch_kl": mismatch}
    seen = experiment.made if asked else (*experiment.made, "reference")
    return Method(experiment, makers, experiment.made), Method(experiment, makers, seen), cache


def _groups_to_score(prepared: Prepared, asked: bool) -> list[Group]:
    """What a run will look up: the groups of its steps and of its evaluations, and KTO's mismatched pairs."""
    experiment, store, held_out = prepared.experiment, prepared.train, prepared.held_out
    evaluated = [held_out[index] for index in range(min(experiment.eval.groups, len(held_out)))]
    if not asked:
        return evaluated
    of = total_steps(experiment.train, len(store))
    wanted: dict[int, Group] = {}
    pairs: list[Group] = []
    for step in range(1, of + 1):
        indices = members(len(store), step, prompts=experiment.train.prompts, seed=experiment.run.seed).tolist()
        if "mismatch_kl" in experiment.made:
            pairs += mismatched([store[index] for index in indices])
        elif len(wanted) == len(store):
            break
        wanted |= {index: store[index] for index in indices if index not in wanted}
    if "mismatch_kl" in experiment.made and evaluated:
        pairs += mismatched(evaluated)
    return [*(wanted[index] for index in sorted(wanted)), *evaluated, *pairs]


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
