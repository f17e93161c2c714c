"""The parts of a run, put together: the policy in its engine, the makers of columns, the loss over them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align_cli import baselines, columns, config, distributed, paths, terminal
from align_cli.data import toy
from align_cli.data.batches import members, steps_per_epoch
from align_cli.data.store import Group, Store
from align_cli.data.tokens import Template, identity
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
from align_cli.method import Method
from align_cli.models import recompute
from align_cli.models.adapters import attach
from align_cli.models.causal import (
    Manner,
    Model,
    commit_of,
    error_of,
    load_model,
    recompute_activations,
    takes_flat_rows,
)
from align_cli.models.head import Head, transform_of
from align_cli.models.scalar import attach_value_head, load_reward_model
from align_cli.models.scalar import error_of as scalar_error
from align_cli.normaliser import LogZ
from align_cli.proposal import Proposal
from align_cli.raters import ByModel, ByProgram, Ensemble, FirstFeature, FromEnsemble, Models, Rater, Within
from align_cli.references import AdapterOff, Cached, Frozen, MismatchKL, digest_of, mismatched, numerics, rows
from align_cli.reinforcement import Scaled, TokenRewards, Whitened, summed
from align_cli.rollouts import DRAWN, Kept
from align_cli.sections import Moments
from align_cli.sources import Dataset, Extra, FromKept, FromPolicy, Replay, Rollout, Sampler
from align_cli.tilt import Lambdas, doubt, fitted, told
from align_cli.train import total_steps

# Largest difference in nats per token between a flat row and padded sequences that rounding explains.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.3}
# The same of scores and values, as a share of the largest: two products in each of some thirty layers round the state.
SCALAR_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}


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
        config = deepspeed_config(options, experiment.optimizer, device, alone=experiment.alone)
        alive = keep_zero3_alive(config)
        network = _network(experiment, dtype)
        engine = DeepSpeedEngine(network, device, manner=manner, config=config, optimizer=experiment.optimizer)
        del alive
    manner = find_manner(
        engine.network,
        engine.module(),
        experiment.model,
        dtype=dtype,
        logits_mb=options.logits_mb,
        device=device,
        scalar=experiment.scalar,
    )
    engine.manner = replace(manner, sparing=options.sparing, temperature=_temperature(experiment))
    return engine


def _temperature(experiment: Experiment) -> float:
    """Of the distributions that are measured."""
    source = experiment.source
    return source.temperature if isinstance(source, FromPolicy) and experiment.tempered else 1.0


def find_manner(
    network: Network,
    module: nn.Module,
    model: Model,
    *,
    dtype: torch.dtype,
    logits_mb: int,
    device: torch.device,
    scalar: Literal["scores", "values"] | None = None,
) -> Manner:
    """The fastest way to measure a model that agrees with its own code on padded sequences; every rank calls it.

    Args:
        network: the model.
        module: what a forward pass calls.
        dtype: of weights and activations.
        logits_mb: `engine.logits_mb`.
        scalar: what its scalar head reads, if it has one.
    """
    flat = model.rows != "padded" and takes_flat_rows(network.config)
    if model.rows in ("shared", "packed") and not flat:
        raise UserError(
            f"model.rows={model.rows}: {model.path} does not send its attention through transformers' interface. "
            "Use model.rows=auto or padded."
        )
    say = terminal.say if distributed.rank() == 0 else terminal.silent
    padded = Manner(flat=False, scalar=scalar)
    if scalar == "scores":
        ways = [Manner(flat, model.rows != "packed", scalar=scalar), padded]
    else:
        output: Any = network.get_output_embeddings()
        known = None
        if model.head == "auto" and isinstance(output, Head):
            known = transform_of(module, output, device)
        wanted = Manner(flat, model.rows != "packed", known, logits_mb * 1_000_000, scalar=scalar)
        ways = [wanted, replace(wanted, transform=None), replace(wanted, flat=False), padded]
    for way in dict.fromkeys(ways):
        if way == padded and scalar != "scores":  # what all others are held against
            break
        fits, told = _tested(network, module, way, dtype, device)
        if fits:
            say(f"self-test: {told}")
            break
        if way == padded:
            raise UserError(f"model.path={model.path}: {told}; it is not a linear head on a response's last state.")
        if model.rows in ("shared", "packed") and way.transform is None:
            raise UserError(f"model.rows={model.rows}: {told} under this architecture. Use model.rows=padded.")
        if distributed.rank() == 0:
            terminal.warn(f"{told}; this architecture is measured another way")
    return way


def _tested(
    network: Network, module: nn.Module, way: Manner, dtype: torch.dtype, device: torch.device
) -> tuple[bool, str]:
    """Whether a way of measuring gives what the model's own code gives, up to rounding, and how far it is off."""
    told: list[str] = []
    fits = True
    if way.scalar != "scores":
        error = max(distributed.gather(error_of(module, way, int(network.config.vocab_size), device)))
        head = "the model's own head" if way.transform is None else "the chunked head"
        told.append(f"{rows(way)} rows and {head} are {error:.2g} nats per token off the model's own code")
        fits = error <= ROUNDING[dtype]
    if way.scalar is not None:
        error = max(distributed.gather(scalar_error(network, module, way, device)))
        told.append(f"{way.scalar} on {rows(way)} rows are {error:.2g} of the largest off the model's own code")
        fits = fits and error <= SCALAR_ROUNDING[dtype]
    return fits, "; ".join(told)


def _network(experiment: Experiment, dtype: torch.dtype) -> Network:
    scores = experiment.scalar == "scores"
    if scores:
        base = load_reward_model(experiment.model, dtype=dtype)
    else:
        base = load_model(experiment.model, dtype=dtype, bits=experiment.adapter.bits)
    commit = commit_of(experiment.model)
    network = attach(base, experiment.adapter, seed=experiment.run.seed, scores=scores, commit=commit)
    if experiment.scalar == "values":
        attach_value_head(network)
    if experiment.engine.gradient_checkpointing:
        recompute_activations(base)
        if experiment.adapter.rank is not None:
            base.enable_input_require_grads()
    if experiment.engine.sparing:
        recompute.install(network)
    network.train()
    return network


def build_methods(
    prepared: Prepared, engine: Engine, device: torch.device, digest: str, learnt: Mapping[str, Any]
) -> tuple[Method, Method, Cached | None]:
    """The loss with the makers of its columns, for training and for evaluation.

    A cached reference is filled now, under the starting weights; evaluation has it even where the loss has none, to
    tell how far the policy has moved.

    Args:
        digest: of the policy's starting weights.
        learnt: what makers of columns had learnt when the run was last saved (`Method.state`).
    """
    experiment = prepared.experiment
    asked = "reference" in experiment.made
    reference, cache = None, None
    if experiment.scalar == "scores":  # a reward model has no reference
        pass
    elif experiment.reference.name == "cached":
        reference = cache = open_cache(experiment, engine, digest)
        fill(cache, prepared, engine, everything=False)
    elif asked and experiment.reference.name == "frozen":
        reference = _frozen(experiment, engine, device)
    elif asked:
        reference = AdapterOff(engine)
    if reference is None:
        method = Method(experiment, producers(experiment), experiment.made)
        return method, method, None
    most = experiment.data.max_length
    mismatch = MismatchKL(engine, reference, budget=experiment.engine.micro_tokens, most=most)
    makers = producers(experiment) | {"reference": reference, "mismatch_kl": mismatch}
    if isinstance(experiment.source, FromPolicy):
        makers |= online(experiment, learnt)
        if "reference_tokens" in experiment.made:
            assert not isinstance(reference, Cached), "a rollout was checked to have no cached reference"
            makers |= {"reference_tokens": reference.tokens, "reference": summed}
        seen = experiment.evaluated
    else:
        seen = experiment.made if asked else (*experiment.made, "reference")
    return Method(experiment, makers, experiment.made), Method(experiment, makers, seen), cache


def online(experiment: Experiment, learnt: Mapping[str, Any]) -> dict[str, columns.Column]:
    """The makers of columns that look at all samples of a step."""
    makers: dict[str, columns.Column] = {"advantages": Whitened(experiment.whiten)}
    if experiment.target is not None:
        makers["log_z"] = LogZ(experiment.normaliser, learnt.get("log_z"))
    if experiment.moments is not None:
        makers["lambdas"] = Lambdas(learnt["lambdas"], list(experiment.moments.features))
    if experiment.contrast is not None and experiment.contrast.scaling == "dynamic":
        makers["rewards"] = Scaled(experiment.reward, learnt.get("rewards"))
    if experiment.kl is not None:
        makers["token_rewards"] = TokenRewards(experiment.kl, learnt.get("token_rewards"))
    return makers


def build_proposal(experiment: Experiment, engine: Engine) -> Proposal | None:
    """What is sampled in the place of the policy; the engine's weights are still those that the run starts from."""
    if experiment.proposal is None:
        return None
    return Proposal(engine, experiment.proposal.every)


def build_source(
    prepared: Prepared, engine: Engine, digest: str, proposal: Proposal | None, run_dir: Path
) -> Dataset | Rollout:
    """Where the steps come from; the engine's weights are still those that the run starts from.

    Args:
        digest: of these weights.
        run_dir: where a run keeps what it draws, if it does.
    """
    experiment = prepared.experiment
    train = experiment.train
    common: dict[str, Any] = {
        "store": prepared.train,
        "prompts": train.prompts,
        "seed": experiment.run.seed,
        "together": train.together,
        "budget": experiment.engine.micro_tokens,
    }
    if not isinstance(experiment.source, FromPolicy):
        return Dataset(**common, engine=engine)
    data = experiment.data
    stop = Template(prepared.tokenizer, template=data.template, system=data.system).stop
    features: list[Rater] = []
    if experiment.moments is not None:
        features = [ByProgram(each.scorer, prepared.tokenizer) for each in experiment.moments.features.values()]
    rater = FirstFeature() if features else build_rater(prepared, engine)
    sampler = Sampler(engine, prepared.tokenizer, rater, experiment.source, stop, features)
    common |= {"sampler": sampler, "proposal": proposal}
    if isinstance(experiment.source, FromKept):
        return Replay(**common, extras={}, kept=replayed(prepared), wanted=experiment.beside)
    extras: dict[str, Extra] = {}
    if "greedy" in experiment.beside:
        extras["greedy"] = partial(_greedy, sampler, experiment.run.seed)
    if "baselines" in experiment.beside:
        extras["baselines"] = _baselines(prepared, sampler, engine, digest)
    kept = Kept(run_dir, _origin(prepared)) if experiment.source.keep else None
    return Rollout(**common, extras=extras, kept=kept)


def _origin(prepared: Prepared) -> dict[str, Any]:
    """What decides how samples are to be read (`align_cli.rollouts.Kept`)."""
    tree = prepared.experiment.tree
    return {
        "tokenizer": identity(prepared.tokenizer),
        "source": {name: tree["source"][name] for name in DRAWN},
        "scorer": tree["scorer"] or tree["target"]["features"],
        "baselines": tree["reward"].get("responses"),
    }


def replayed(prepared: Prepared) -> Kept:
    """The rollouts that a run learns from."""
    assert isinstance(prepared.experiment.source, FromKept), "a replay has a path"
    return Kept(Path(prepared.experiment.source.path), _origin(prepared))


def check_replay(prepared: Prepared) -> None:
    """Refuse a replay of a run that has kept too few steps, or that has drawn others than this run would have.

    Raises:
        UserError: with how to fix it.
    """
    experiment, store, kept = prepared.experiment, prepared.train, replayed(prepared)
    of, there = total_steps(experiment.train, len(store)), kept.steps()
    if there == 0:
        raise UserError(f"source.path={kept.run}: it keeps no responses. Use a run with source.keep=true.")
    if there < of:
        raise UserError(
            f"source.path={kept.run}: it keeps the responses of {there} steps, this run has {of}. "
            f"Use train.steps={there}, or a run of as many steps."
        )
    for step in range(1, of + 1):
        kept.check(step, [store[index] for index in _members(experiment, store, step).tolist()], experiment.beside)


def _greedy(sampler: Sampler, seed: int, prompts: Sequence[Group], number: int) -> list[NDArray[np.float32] | None]:
    """The column `greedy`."""
    drawn = sampler.draw(prompts, (seed, number), samples=1, temperature=0.0)
    found = {group.index: group.ratings[0] for group in drawn}
    return [found.get(group.index) for group in prompts]


def _baselines(prepared: Prepared, sampler: Sampler, engine: Engine, digest: str) -> baselines.Baselines:
    """The column `baselines`, for all prompts of the run."""
    experiment, store = prepared.experiment, prepared.train
    assert experiment.contrast is not None
    origin = {
        "weights": digest,
        "numerics": numerics(
            dtype=experiment.engine.dtype(engine.device),
            bits=experiment.adapter.bits,
            manner=engine.manner,
            device=engine.device,
        ),
        "scorer": experiment.tree["scorer"],
        "code": _content(experiment),
        "tokenizer": identity(prepared.tokenizer),
    }
    return baselines.prepare(
        sampler,
        (store[int(index)] for index in _groups_of_steps(experiment, store)),
        responses=experiment.contrast.responses,
        seed=experiment.run.seed,
        kept=paths.cache() / "baselines",
        origin=origin,
        say=terminal.say if distributed.rank() == 0 else terminal.silent,
    )


def learn_first(prepared: Prepared, source: Dataset | Rollout) -> dict[str, Any]:
    """What makers of columns have to know before the first step, from the policy as it starts; every rank calls it.

    Returns:
        As `Method.state`.
    """
    moments = prepared.experiment.moments
    if moments is None:
        return {}
    assert isinstance(source, Rollout), "features are of samples"
    # One rank's result for all: another processor may round otherwise.
    found = distributed.gather(_fitted(source, moments))[0]
    if distributed.rank() == 0:
        terminal.say(told(found))
        against = doubt(found)
        if against is not None:
            terminal.warn(against)
    return {"lambdas": found}


def _fitted(source: Rollout, moments: Moments) -> dict[str, Any]:
    """λ under which the starting model's samples have the moments; every rank calls it."""
    if moments.by == "shared":
        return fitted(source.spread(moments.samples, apiece=1), moments.wanted, apart=False)
    # Half of the logarithm each: many prompts to average over, many responses to estimate the Z of one.
    return fitted(source.spread(moments.samples, apiece=math.isqrt(moments.samples)), moments.wanted, apart=True)


def _content(experiment: Experiment) -> str:
    """What decides a rating beside the options of the `scorer` section: a program's text, or the models' weights."""
    if not isinstance(experiment.scorer, Models):
        scorer = config.find("align_cli.scorers", experiment.tree["scorer"]["name"], "scorer")
        files = [*config.sources(scorer), Path(toy.__file__)]  # `addition` asks the embedded world
        return "\n".join(path.read_text(encoding="utf-8") for path in files)
    models = [replace(experiment.model, path=path, revision=None) for path in experiment.scorer.paths]
    return "\n".join(map(digest_of, models))


def build_rater(prepared: Prepared, engine: Engine) -> Rater:
    """Who rates what the policy samples; every rank calls it."""
    experiment = prepared.experiment
    assert experiment.scorer is not None, "a rollout was checked to have one"
    scorer = experiment.scorer
    if not isinstance(scorer, Models):
        rate = ByProgram(scorer, prepared.tokenizer)
        return Within(rate) if "ratings" in experiment.target_asks else rate
    if not isinstance(scorer, FromEnsemble):
        return _reward_model(experiment, engine, scorer.path, visits=False)
    visits = scorer.apart and engine.device.type == "cuda" and experiment.engine.stage != 3
    members = [_reward_model(experiment, engine, path, visits=visits) for path in scorer.paths]
    return Ensemble(members, scorer.aggregate, scorer.caution)


def _reward_model(experiment: Experiment, engine: Engine, path: str, *, visits: bool) -> ByModel:
    """The reward model of a folder beside the policy; every rank calls it.

    Args:
        visits: whether it is on the device only while it rates.
    """
    model, device = replace(experiment.model, path=path, revision=None), engine.device
    dtype, logits_mb = experiment.engine.dtype(device), experiment.engine.logits_mb
    network, called = _beside(experiment, device, lambda: load_reward_model(model, dtype=dtype))
    manner = find_manner(network, called, model, dtype=dtype, logits_mb=logits_mb, device=device, scalar="scores")
    if visits:
        called.to("cpu")
    return ByModel(called, manner, device, experiment.engine.micro_tokens, visits)


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
        yield from mismatched([train[index] for index in indices], experiment.data.max_length)
    evaluated = [held_out[index] for index in range(min(experiment.eval.groups, len(held_out)))]
    if evaluated:
        yield from mismatched(evaluated, experiment.data.max_length)


def _frozen(experiment: Experiment, engine: Engine, device: torch.device) -> Frozen:
    """A second model beside the policy, on flat rows if its own architecture takes them."""
    model = experiment.model
    if experiment.reference.path is not None:
        model = replace(model, path=experiment.reference.path, revision=None)
    dtype = experiment.engine.dtype(device)
    bits = experiment.adapter.bits if experiment.engine.stage != 3 else None
    network, called = _beside(experiment, device, lambda: load_model(model, dtype=dtype, bits=bits))
    logits_mb = experiment.engine.logits_mb
    manner = find_manner(network, called, model, dtype=dtype, logits_mb=logits_mb, device=device)
    return Frozen(called, replace(manner, temperature=_temperature(experiment)))


def _beside(
    experiment: Experiment, device: torch.device, load: Callable[[], PreTrainedModel]
) -> tuple[PreTrainedModel, nn.Module]:
    """A model that does not train, and what a forward pass of it calls."""
    if experiment.engine.stage != 3:
        network = load().to(device).eval()  # pyright: ignore[reportArgumentType]
        return network, network
    import deepspeed

    config = deepspeed_config(experiment.engine, experiment.optimizer, device, alone=False)
    alive = keep_zero3_alive(config)
    network = load().eval()
    called, *_ = deepspeed.initialize(model=network, config=config, dist_init_required=False)
    del alive
    return network, called
