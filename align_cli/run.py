"""One run from start to end, as each of its ranks lives it: build, evaluate, train, evaluate, export."""

import json
import math
import os
import resource
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from align_cli import config, distributed, evaluate, paths, rundir, terminal, world
from align_cli.checkpoints import Checkpoints
from align_cli.data import toy
from align_cli.data.batches import members
from align_cli.data.store import Group, Store
from align_cli.data.store import prepare as prepare_data
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
from align_cli.experiment import Experiment, producers, read
from align_cli.models.adapters import attach
from align_cli.models.causal import flat_rows_error, load_model, load_tokenizer, read_architecture, takes_flat_rows
from align_cli.references import AdapterOff, Cached, Frozen, MismatchKL, Say, mismatched, weights_digest
from align_cli.rundir import Scalar
from align_cli.tracking import Silent, Tracker
from align_cli.train import Method, Progress, evaluate_loss, stop_signals, total_steps, train
from align_cli.world import World

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


def prepare(experiment: Experiment) -> Prepared:
    """Make or find the embedded world and the tokenised data; on each node one rank does it, the others find it done.

    Raises:
        UserError: model or data cannot be read, or the data has nothing to learn from.
    """
    transformers_logging.disable_progress_bar()
    leader = os.environ.get("LOCAL_RANK", "0") == "0"
    if not leader:
        distributed.barrier()
    prepared = _prepare(experiment, terminal.say if leader else _quiet)
    if leader:
        distributed.barrier()
    return prepared


def _quiet(text: str) -> None:
    pass


def _prepare(experiment: Experiment, say: Say) -> Prepared:
    try:
        paths.cache().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"ALIGN_CACHE={paths.cache()} cannot be written: {error.strerror}; another folder would be right."
        ) from error
    problems = None
    if experiment.world is not None and "world" in (experiment.model.path, experiment.data.path):
        with terminal.counter() as progress:
            made = world.prepare(experiment.world, cache=paths.cache(), train_sft=_imitate, say=say, progress=progress)
        problems = made.held_out
        if experiment.model.path == "world":
            experiment = replace(experiment, model=replace(experiment.model, path=str(made.model)))
        if experiment.data.path == "world":
            experiment = replace(experiment, data=replace(experiment.data, path=str(made.samples)))
    tokenizer = load_tokenizer(experiment.model)
    if experiment.reference.path is not None:
        try:
            load_tokenizer(replace(experiment.model, path=experiment.reference.path, revision=None))
        except UserError as error:
            raise UserError(f"reference.path={experiment.reference.path}: {error}") from error
    store, held_out = prepare_data(
        experiment.data,
        tokenizer,
        seed=experiment.run.seed,
        cache=paths.cache() / "data",
        say=say,
        pairwise=experiment.pairwise,
    )
    _refuse_unfit(experiment, store, held_out)
    return Prepared(experiment, tokenizer, store, held_out, problems)


def _refuse_unfit(experiment: Experiment, store: Store, held_out: Store) -> None:
    """Refuse data that the algorithm learns nothing from, or that the model has no positions for."""
    if "rewards" in experiment.made and "mismatch_kl" not in experiment.made and store.responses.max() < 2:
        raise UserError(
            f"algo={experiment.algorithm} compares the responses of a prompt; {experiment.data.path} has one for each. "
            "algo=sft learns from one."
        )
    told = read_architecture(experiment.model).to_dict()
    positions = [told[name] for name in ("max_position_embeddings", "n_positions") if isinstance(told.get(name), int)]
    longest = max(int(part.longest.max()) for part in (store, held_out) if len(part))
    if positions and longest > positions[0]:
        raise UserError(
            f"data.max_length={experiment.data.max_length}: a prompt with its response has {longest} tokens; "
            f"model.path={experiment.model.path} has {positions[0]} positions. data.max_length={positions[0]} drops or "
            "shortens what is longer."
        )


def _imitate(demonstrations: Path, start: Path, out: Path, options: World) -> None:
    """The embedded world's SFT, by the same loop as every other run."""
    if distributed.world() > 1:
        raise UserError("the embedded world is made by one process; run align train launch=prepare first.")
    folder = out.with_name("sft")
    chosen = {
        "algo": "sft",
        "model": "hf",
        "model.path": start,
        "data": "file",
        "data.path": demonstrations,
        "data.template": "text",
        "data.held_out": 0,
        "train.steps": options.sft_steps,
        "train.prompts": options.sft_prompts,
        "train.lr": options.sft_lr,
        "eval.groups": 0,
        "checkpoint.every": options.sft_steps,
        "track": "none",
        "run.dir": folder,
        "run.seed": options.seed,
    }

    def told(value: object) -> str:
        return config.quoted(str(value)) if isinstance(value, Path) else str(value)

    tree = config.compose("train", [f"{key}={told(value)}" for key, value in chosen.items()])
    folder.mkdir()
    run(_prepare(read(tree), _quiet), folder)
    (folder / "model").rename(out)
    shutil.rmtree(folder)


def run(prepared: Prepared, run_dir: Path) -> dict[str, Scalar]:
    """Train to the end and write everything into the run directory; every rank calls it.

    Returns:
        The summary.

    Raises:
        Stopped: a signal asked for it; the run can be resumed.
    """
    experiment = prepared.experiment
    device = distributed.local_device(experiment.launch.accelerator)
    engine = build_engine(experiment, device)
    method, evaluation, cache = _methods(prepared, engine, device)
    checkpoints = Checkpoints(run_dir / "checkpoints", experiment.checkpoint.keep)
    progress = Progress()
    latest = checkpoints.latest()
    with stop_signals() as stop:
        if latest is None:
            progress.before = _evaluate(prepared, engine, evaluation)[0]
        else:
            engine.load(latest.folder)
            progress = Progress(**latest.state())
        with _tracker(prepared, run_dir, progress) as tracker:
            _introduce(prepared, engine, run_dir, progress)
            train(
                engine,
                method,
                evaluation,
                prepared.train,
                prepared.held_out,
                progress=progress,
                checkpoints=checkpoints,
                tracker=tracker,
                stop=stop,
            )
            after, samples = _evaluate(prepared, engine, evaluation)
            _export(prepared, engine, run_dir / "model")
            summary = _summary(progress, after, cache, device)
            if distributed.rank() == 0:
                rundir.write_atomic(run_dir / "samples.json", samples)
                rundir.write_summary(run_dir, summary)
                tracker.close(summary)
    distributed.barrier()
    return summary


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
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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


def _methods(prepared: Prepared, engine: Engine, device: torch.device) -> tuple[Method, Method, Cached | None]:
    """The loss with the makers of its columns, for training and for evaluation.

    A cached reference is filled now, under the starting weights; evaluation has it even where the loss has none, to
    tell how far the policy has moved.
    """
    experiment = prepared.experiment
    asked = "reference" in experiment.made
    budget = experiment.engine.micro_tokens
    reference, cache = None, None
    if experiment.reference.name == "cached":
        reference = cache = Cached(_cache_home(experiment, engine, device))
        wanted = _groups_to_score(prepared, asked)
        cache.fill(engine, wanted, budget=budget, say=terminal.say if distributed.rank() == 0 else _quiet)
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


def _cache_home(experiment: Experiment, engine: Engine, device: torch.device) -> Path:
    commit = vars(engine.network.config).get("_commit_hash")
    digest = weights_digest(experiment.model.path, commit) if distributed.rank() == 0 else ""
    return Cached.home(
        paths.cache(), distributed.gather(digest)[0], dtype=experiment.engine.dtype(device), flat=engine.flat
    )


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
    options = experiment.engine
    model = experiment.model
    if experiment.reference.path is not None:
        model = replace(model, path=experiment.reference.path, revision=None)
    dtype = options.dtype(device)
    network: nn.Module
    if options.stage != 3:
        network = load_model(model, dtype=dtype, bits=experiment.adapter.bits).to(device)  # pyright: ignore
        return Frozen(network.eval(), flat=engine.flat)
    import deepspeed

    config = deepspeed_config(options, experiment.optimizer, device)
    alive = keep_zero3_alive(config)
    second, *_ = deepspeed.initialize(
        model=load_model(model, dtype=dtype, bits=None).eval(), config=config, dist_init_required=False
    )
    del alive
    return Frozen(second, flat=engine.flat)


def _evaluate(prepared: Prepared, engine: Engine, method: Method) -> tuple[dict[str, float], str]:
    """Held-out loss and metrics, and what a program makes of sampled responses where the data brings one."""
    experiment = prepared.experiment
    figures = evaluate_loss(engine, method, prepared.held_out)
    if prepared.problems is None or experiment.world is None or experiment.eval.prompts == 0:
        return figures, "[]\n"
    rows = [json.loads(line) for line in prepared.problems.read_text(encoding="utf-8").splitlines()]
    # Under ZeRO-3 every forward pass is a collective, so all ranks sample, and sample the same.
    judged = evaluate.exact_match(
        engine.network,  # pyright: ignore[reportArgumentType]  generation works through adapters as well
        prepared.tokenizer,
        [row["prompt"] for row in rows[: experiment.eval.prompts]],
        toy.score,
        toy.correct,
        samples=experiment.eval.samples,
        max_new_tokens=experiment.world.max_new_tokens,
        seed=experiment.run.seed,
        examples=8,
    )
    return figures | judged.figures, json.dumps([asdict(example) for example in judged.examples], indent=1) + "\n"


def _tracker(prepared: Prepared, run_dir: Path, progress: Progress) -> Silent:
    if distributed.rank() != 0:
        return Silent()
    experiment = prepared.experiment
    of = total_steps(experiment.train, len(prepared.train))
    return Tracker(run_dir, experiment.tree, experiment.track, steps=of, resumed=progress.step or None)


def _introduce(prepared: Prepared, engine: Engine, run_dir: Path, progress: Progress) -> None:
    if distributed.rank() != 0:
        return
    experiment, store = prepared.experiment, prepared.train
    of = total_steps(experiment.train, len(store))
    dtype = str(experiment.engine.dtype(engine.device)).removeprefix("torch.")
    rows = "flat rows" if engine.flat else "padded rows"
    trained = sum(p.numel() for p in engine.network.parameters() if p.requires_grad)
    terminal.say(
        f"{experiment.algorithm}: {distributed.world()} rank(s) on {engine.device.type}, {dtype}, {rows}, "
        f"engine={experiment.engine.name}; {trained:,} trained weights on this rank"
    )
    going = f"goes on after step {progress.step}" if progress.step else "starts"
    terminal.say(
        f"{of} optimizer steps of {min(experiment.train.prompts, len(store))} prompts, {len(store)} prompts in all; "
        f"{going}; output in {run_dir}"
    )


def _export(prepared: Prepared, engine: Engine, folder: Path) -> None:
    """The result as a Hugging Face folder, whole or absent."""
    temporary = folder.with_name(folder.name + ".tmp")
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    distributed.barrier()
    engine.export(temporary)
    if distributed.rank() == 0:
        prepared.tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    distributed.barrier()


def _summary(
    progress: Progress, after: dict[str, float], cache: Cached | None, device: torch.device
) -> dict[str, Scalar]:
    peak = max(distributed.gather(_peak_memory(device)))
    summary: dict[str, Scalar] = {
        "steps": progress.step,
        "loss/first": progress.first_loss,
        "loss/last": progress.last_loss,
        "groups_per_second": progress.groups / progress.seconds if progress.seconds else math.nan,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else math.nan,
        "peak_memory_gb": peak / 1e9,
    }
    summary |= {f"eval/before/{name}": value for name, value in progress.before.items()}
    summary |= {f"eval/after/{name}": value for name, value in after.items()}
    summary |= {name: value for name, value in after.items() if name.startswith("displacement/")}
    if cache is not None:
        summary |= {"reference/measured": cache.measured}
    return summary


def _peak_memory(device: torch.device) -> float:
    """Bytes, at most: of this GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
