"""One run from start to end, as each of its ranks lives it: build, evaluate, train, evaluate, export."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from align_cli import (
    assembly,
    cache,
    config,
    distributed,
    evaluate,
    paths,
    raters,
    reading,
    resources,
    rundir,
    summaries,
    terminal,
    world,
)
from align_cli.assembly import Prepared, build_engine, build_methods, build_proposal, build_source
from align_cli.checkpoints import Checkpoint, Checkpoints
from align_cli.data import toy
from align_cli.data.store import Store
from align_cli.data.store import prepare as prepare_data
from align_cli.engine import Engine
from align_cli.errors import RunError, Stopped, UserError, first_line
from align_cli.evaluate import evaluate_loss, evaluate_samples
from align_cli.experiment import Experiment
from align_cli.method import Method
from align_cli.models.causal import commit_of, load_tokenizer, positions, read_architecture
from align_cli.models.scalar import classifier, is_reward_model
from align_cli.precision import Arithmetic, choose_for
from align_cli.proposal import UPDATES
from align_cli.raters import FromModel, Models, Scorer
from align_cli.references import Say, rows, weights_digest
from align_cli.rundir import Scalar
from align_cli.sources import Dataset, FromDataset, FromKept, FromPolicy, Rollout
from align_cli.tracking import Silent, Tracker
from align_cli.train import Progress, stop_signals, total_steps, train
from align_cli.world import World, WorldPaths


def prepare(experiment: Experiment, say: Say = terminal.say) -> Prepared:
    """Make or find the embedded world and the tokenised data; on each node one rank does it, the others find it done.

    Args:
        say: is told what is found and done, by the rank that does it.

    Raises:
        UserError: model or data cannot be read, or the data has nothing to learn from.
    """
    transformers_logging.disable_progress_bar()
    leader = os.environ.get("LOCAL_RANK", "0") == "0"
    prepared, failure = None, None
    if leader:
        try:
            prepared = _prepare(experiment, say)
        except Exception as error:  # whatever it is, the ranks that wait have to be told
            failure = error
    told = [text for text in distributed.gather(None if failure is None else first_line(failure)) if text]
    if failure is not None:
        raise failure
    if told:
        raise RunError(f"another rank could not prepare the run: {told[0]}")
    return prepared if prepared is not None else _prepare(experiment, terminal.silent)


def _prepare(experiment: Experiment, say: Say) -> Prepared:
    try:
        paths.cache().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"ALIGN_CACHE={paths.cache()} cannot be written: {error.strerror}; use another folder."
        ) from error
    problems = None
    if experiment.world is not None and "world" in (experiment.model.path, experiment.data.path):
        made = world_of(experiment.world, say)
        problems = made.held_out
        if experiment.model.path == "world":
            experiment = replace(experiment, model=replace(experiment.model, path=str(made.model)))
        if experiment.data.path == "world":
            experiment = replace(experiment, data=replace(experiment.data, path=str(made.samples)))
    for scorer in programs(experiment):
        raters.load(scorer)
    tokenizer = load_tokenizer(experiment.model)
    if experiment.reference.path is not None:
        try:
            other = load_tokenizer(replace(experiment.model, path=experiment.reference.path, revision=None))
        except UserError as error:
            raise UserError(f"reference.path={experiment.reference.path}: {error}") from error
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"reference.path={experiment.reference.path}: its tokenizer has other tokens than "
                f"model.path={experiment.model.path}; log-probabilities of the same token ids would not compare."
            )
    if isinstance(experiment.scorer, Models):
        key = "scorer.path" if isinstance(experiment.scorer, FromModel) else "scorer.paths"
        for path in experiment.scorer.paths:
            _refuse_rater(experiment, key, path, tokenizer)
    source = experiment.source
    store, held_out = prepare_data(
        experiment.data,
        tokenizer,
        seed=experiment.run.seed,
        cache=paths.cache() / "data",
        say=say,
        pairwise=experiment.pairwise and isinstance(source, FromDataset),  # a run that samples compares samples
        strict=experiment.labelled and isinstance(source, FromDataset),
        sampled=source.max_new_tokens if isinstance(source, FromPolicy) else None,
    )
    cache.touch(store.path.parent)
    _refuse_unfit(experiment, store, held_out)
    _tell_one_sided(experiment, store, say)
    prepared = Prepared(experiment, tokenizer, store, held_out, problems)
    if isinstance(source, FromKept):
        assembly.check_replay(prepared)
    return prepared


def world_of(options: World, say: Say) -> WorldPaths:
    """The embedded world of these options, made if it is not there."""
    with terminal.counter() as progress:
        made = world.prepare(options, cache=paths.cache(), train_sft=_imitate, say=say, progress=progress)
    cache.touch(made.model.parent)
    return made


def programs(experiment: Experiment) -> list[Scorer]:
    """The functions of texts that rate samples."""
    of_features = [] if experiment.moments is None else [each.scorer for each in experiment.moments.features.values()]
    own = experiment.scorer
    return of_features if own is None or isinstance(own, Models) else [own, *of_features]


def _refuse_rater(experiment: Experiment, key: str, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a folder that holds no reward model, or one that reads other tokens than the policy writes.

    Args:
        key: that names the folder.
    """
    model = replace(experiment.model, path=path, revision=None)
    try:
        architecture = read_architecture(model)
        if not is_reward_model(architecture):
            holds = ", ".join(architecture.architectures or ()) or architecture.model_type
            raise UserError(f"it holds {holds}, not a reward model. algo=bradley_terry makes one of a language model.")
        classifier(architecture, path)
        other = load_tokenizer(model)
    except UserError as error:
        raise UserError(f"{key}={path}: {str(error).removeprefix(f'model.path={path}: ')}") from error
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{key}={path}: its tokenizer has other tokens than model.path={experiment.model.path}; the policy's "
            "token ids would mean something else to it. Use a reward model of the policy's family."
        )
    if other.chat_template and tokenizer.chat_template and other.chat_template != tokenizer.chat_template:
        raise UserError(
            f"{key}={path}: its chat template is another than that of model.path={experiment.model.path}; it "
            "would read conversations that it was not trained on. Use a reward model of the same template."
        )


def _refuse_unfit(experiment: Experiment, store: Store, held_out: Store) -> None:
    """Refuse data that the algorithm learns nothing from, or that the model has no positions for."""
    source = experiment.source
    compares = "rewards" in experiment.made and "mismatch_kl" not in experiment.made
    if isinstance(source, FromDataset) and compares and store.responses.max() < 2:
        raise UserError(
            f"algo={experiment.algorithm} compares the responses of a prompt; {experiment.data.path} has one for each. "
            "algo=sft learns from one."
        )
    architecture = read_architecture(experiment.model)
    told = architecture.to_dict()
    largest = store.largest
    if isinstance(told.get("vocab_size"), int) and largest >= told["vocab_size"]:
        raise UserError(
            f"model.path={experiment.model.path}: its tokenizer gives token {largest}, its weights know "
            f"{told['vocab_size']} tokens. Use a tokenizer that belongs to the weights."
        )
    there = positions(architecture)
    longest = max(int(part.longest.max()) for part in (store, held_out) if len(part))
    if isinstance(source, FromPolicy):
        prompt = max(int(part.prompt_tokens.max()) for part in (store, held_out) if len(part))
        if there is not None and prompt + source.max_new_tokens > there:
            raise UserError(
                f"source.max_new_tokens={source.max_new_tokens}: a prompt of {prompt} tokens and it exceed the "
                f"{there} positions of model.path={experiment.model.path}. data.max_length={there} drops "
                "or shortens prompts that leave too little room."
            )
        return
    if there is not None and longest > there:
        raise UserError(
            f"data.max_length={experiment.data.max_length}: a prompt with its response has {longest} tokens; "
            f"model.path={experiment.model.path} has {there} positions. data.max_length={there} drops or "
            "shortens what is longer."
        )


def _tell_one_sided(experiment: Experiment, store: Store, say: Say) -> None:
    """Say where KTO's threshold has all responses on one side of it, as far as the first rows tell."""
    threshold = experiment.tree["algo"].get("threshold")
    if threshold is None or "mismatch_kl" not in experiment.made or experiment.tree["reward"]["name"] != "given":
        return
    ratings = np.concatenate([store[index].ratings for index in range(min(len(store), 1000))])
    good = float((ratings > threshold).mean())
    if good in (0.0, 1.0):
        told = "above" if good else "not above"
        say(
            f"warning: all rewards, {ratings.min():g} to {ratings.max():g}, are {told} algo.threshold={threshold}; "
            f"algo={experiment.algorithm} learns from responses on both sides of it"
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
        "engine": "torch",
        "checkpoint.every": options.sft_steps,
        "track": "none",
        "run.dir": folder,
        "run.seed": options.seed,
    }

    def told(value: object) -> str:
        return config.quoted(str(value)) if isinstance(value, Path) else str(value)

    tree = config.compose("train", [f"{key}={told(value)}" for key, value in chosen.items()])
    folder.mkdir()
    try:
        run(_prepare(reading.read(tree), terminal.silent), folder)
    except Stopped:  # what is half made is made again from the start
        raise KeyboardInterrupt from None
    (folder / "model").rename(out)
    shutil.rmtree(folder)


def run(prepared: Prepared, run_dir: Path) -> dict[str, Scalar]:
    """Train to the end and write everything into the run directory; every rank calls it.

    Returns:
        The summary.

    Raises:
        Stopped: a signal asked for it; the run can be resumed.
    """
    device = distributed.local_device(prepared.experiment.launch.accelerator)
    checkpoints = Checkpoints(run_dir / "checkpoints", prepared.experiment.checkpoint.keep)
    latest = checkpoints.latest()
    progress = Progress() if latest is None else Progress(**latest.state())
    precision = _precision(prepared, device, progress)
    experiment = _with_precision(prepared.experiment, precision)
    prepared = replace(prepared, experiment=experiment)
    _warn_of_little_memory(experiment, device)
    engine = build_engine(experiment, device)
    inputs = _inputs(prepared, engine)
    if latest is not None:
        _refuse_changes(latest, progress, inputs)
    progress.inputs, progress.precision = inputs, asdict(precision)
    _introduce(prepared, engine, run_dir, progress)
    proposal = build_proposal(experiment, engine)
    source = build_source(prepared, engine, inputs["weights"], proposal, run_dir)
    if latest is None:
        progress.columns = assembly.learn_first(prepared, source)
    method, evaluation, cached = build_methods(prepared, engine, device, inputs["weights"], progress.columns)

    def evaluated() -> dict[str, float]:
        return _held_out(prepared, engine, evaluation, source)

    with stop_signals() as stop:
        if latest is None:
            told = evaluated()
            figures, samples = _judged(prepared, engine)
            progress.before = told | figures
            if distributed.rank() == 0:
                rundir.write_atomic(run_dir / rundir.SAMPLES_BEFORE, samples)
        else:
            engine.load(latest.folder)
            if proposal is not None:
                proposal.load(latest.folder)
        with _tracker(prepared, run_dir, progress) as tracker:
            train(
                engine,
                method,
                evaluated,
                source,
                prepared.train,
                proposal=proposal,
                progress=progress,
                checkpoints=checkpoints,
                tracker=tracker,
                stop=stop,
            )
            figures, samples = _judged(prepared, engine)
            after = evaluated() | figures
            _export(prepared, engine, run_dir / "model")
            counters = {} if cached is None else cached.counters()
            if proposal is not None:
                counters[UPDATES] = proposal.updates
            sampled = isinstance(source, Rollout)
            summary = summaries.summary(progress, after, counters, device, sampled=sampled)
            if distributed.rank() == 0:
                rundir.write_atomic(run_dir / rundir.SAMPLES, samples)
                rundir.write_summary(run_dir, summary)
                tracker.close(summary)
    distributed.barrier()
    return summary


def score(prepared: Prepared) -> None:
    """Measure the reference of everything that the data holds and say so; every rank calls it."""
    device = distributed.local_device(prepared.experiment.launch.accelerator)
    experiment = _with_precision(prepared.experiment, _precision(prepared, device, Progress()))
    prepared = replace(prepared, experiment=experiment)
    engine = build_engine(experiment, device)
    cached = assembly.open_cache(experiment, engine, _inputs(prepared, engine)["weights"])
    assembly.fill(cached, prepared, engine, everything=True)
    if distributed.rank() == 0:
        terminal.result(
            f"reference of {cached.measured + cached.found:,} responses: {cached.measured:,} measured, "
            f"{cached.found:,} found, {cached.seconds:.1f} s; in {cached.kept.folder}"
        )


def _precision(prepared: Prepared, device: torch.device, progress: Progress) -> Arithmetic:
    """What `engine.precision` means here, the same for all ranks and for all sessions of a run; every rank calls it."""
    wanted = prepared.experiment.engine
    if progress.precision:
        return Arithmetic(**progress.precision)  # pyright: ignore[reportArgumentType]  a checkpoint's JSON
    if wanted.stage == 0 and wanted.dtype(device) == torch.bfloat16:
        raise UserError("engine=zero0: DeepSpeed's stage 0 has no fp32 sums of bfloat16 gradients. Use engine=zero1.")
    if wanted.precision != "bf16" and device.type == "cpu":
        found = distributed.gather(choose_for(read_architecture(prepared.experiment.model), paths.cache()))[0]
        if wanted.stage == 0:  # which has no fp32 sums of bfloat16 gradients
            return Arithmetic("fp32", found.products, "engine=zero0")
        return found if wanted.precision == "auto" else Arithmetic("fp32", found.products, "engine.precision")
    precision = "bf16" if wanted.dtype(device) == torch.bfloat16 else "fp32"
    return Arithmetic(precision, "highest", "" if wanted.precision == "auto" else "engine.precision")


def _with_precision(experiment: Experiment, choice: Arithmetic) -> Experiment:
    torch.set_float32_matmul_precision(choice.products)
    return replace(experiment, engine=replace(experiment.engine, precision=choice.precision))


def _warn_of_little_memory(experiment: Experiment, device: torch.device) -> None:
    """Say where other programs leave a rank less of its GPU than the run needs; every rank calls it."""
    if device.type != "cuda":
        return
    free = distributed.gather(torch.cuda.mem_get_info(device)[0])
    try:
        needed = sum(resources.terms(experiment, resources.shape_of(experiment)).values())
    except UserError:  # its memory cannot be planned
        return
    short = [rank for rank, left in enumerate(free) if left < needed]
    if short and distributed.rank() == 0:
        terminal.warn(
            f"memory is short: {min(free) / 1e9:.1f} GB of a GPU are free and the plan needs {needed / 1e9:.1f} "
            f"(rank {', '.join(map(str, short))}). Is another program on it?"
        )


def _inputs(prepared: Prepared, engine: Engine) -> dict[str, str]:
    """What a run learns from, starts from and computes on; a resumed run must find the same.

    Raises:
        UserError: ranks read different rows.
    """
    experiment = prepared.experiment
    found = {"train": prepared.train.digest, "held_out": prepared.held_out.digest, "device": engine.device.type}
    of_ranks = distributed.gather(found)
    others = [str(rank) for rank, theirs in enumerate(of_ranks) if theirs != of_ranks[0]]
    if others:
        raise UserError(
            f"data.path={experiment.data.path}: rank {', '.join(others)} found other rows, or another kind of device, "
            "than rank 0. Give every node the same data, and the same devices."
        )
    if distributed.rank() == 0:
        found["weights"] = weights_digest(experiment.model.path, commit_of(experiment.model))
        if experiment.reference.path is not None:
            found["reference"] = _digest_here(experiment.reference.path)
        if isinstance(experiment.scorer, Models):
            found["scorer"] = " ".join(_digest_here(path) for path in experiment.scorer.paths)
    return distributed.gather(found)[0]


def _digest_here(path: str) -> str:
    """The digest of the weights in a folder; a model of the hub is what its name says."""
    return weights_digest(path, None) if (Path(path) / "config.json").is_file() else path


def _refuse_changes(latest: Checkpoint, progress: Progress, inputs: dict[str, str]) -> None:
    """Refuse to go on with other ranks, data or weights than before."""
    if latest.ranks != distributed.world():
        raise UserError(
            f"{latest.folder} is of {latest.ranks} rank(s), this run has {distributed.world()}. "
            "Start as many as before."
        )
    keys = {"weights": "model.path", "train": "data.path", "held_out": "data.path"}
    keys |= {"reference": "reference.path", "scorer": "scorer.path or scorer.paths"}
    then, now = progress.inputs.get("device", inputs["device"]), inputs["device"]
    if then != now:
        raise UserError(
            f"{latest.folder}: the run began on {then}, and this machine offers it {now}; `align doctor` says why. "
            "Resume it where it began, or choose a new run.dir."
        )
    # a key that was not kept then cannot be compared now
    there = [name for name in keys if name in inputs and name in progress.inputs]
    changed = dict.fromkeys(keys[name] for name in there if progress.inputs[name] != inputs[name])
    if changed:
        raise UserError(
            f"{latest.folder}: what {' and '.join(changed)} names has changed since the run began; put it back to "
            "resume the run, or choose a new run.dir."
        )


def _held_out(prepared: Prepared, engine: Engine, method: Method, source: Dataset | Rollout) -> dict[str, float]:
    """Loss and metrics on held-out responses, or what the policy's own responses to held-out prompts are like."""
    if isinstance(source, Rollout):
        return evaluate_samples(engine, method, source.sampler, prepared.held_out)
    return evaluate_loss(engine, method, prepared.held_out)


def _judged(prepared: Prepared, engine: Engine) -> tuple[dict[str, float], str]:
    """What a program makes of sampled responses where the data brings one, and some of them."""
    experiment = prepared.experiment
    writes = experiment.scalar != "scores"  # a reward model does not
    if prepared.problems is None or experiment.world is None or experiment.eval.prompts == 0 or not writes:
        return {}, "[]\n"
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
    return judged.figures, json.dumps([asdict(example) for example in judged.examples], indent=1) + "\n"


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
    if progress.precision["reason"]:
        dtype += f" ({progress.precision['reason']})"
    # ZeRO-3 keeps a weight's whole size beside what is left of it here
    sizes = (vars(p).get("ds_numel", p.numel()) for p in engine.network.parameters() if p.requires_grad)
    terminal.say(
        f"{experiment.algorithm}: {distributed.world()} rank(s) on {engine.device.type}, {dtype}, "
        f"{rows(engine.manner)} rows, engine={experiment.engine.name}; {sum(sizes):,} trained weights"
    )
    going = f"goes on after step {progress.step}" if progress.step else "starts"
    prompts = min(experiment.train.prompts, len(store))
    tokens = float((store.prompt_tokens + store.response_tokens).mean()) * prompts
    size = f"{tokens:,.0f} tokens"
    if isinstance(experiment.source, FromPolicy):
        size = f"{experiment.source.samples} responses sampled for each"
    terminal.say(
        f"{of} optimizer steps of {prompts} prompts ({size}, at most {experiment.engine.micro_tokens:,} tokens at a "
        f"time), {len(store)} prompts in all; {going}; output in {run_dir}"
    )
    if (slow := _slow_sampling(experiment)) is not None:
        terminal.say(slow)


def _slow_sampling(experiment: Experiment) -> str | None:
    """What is worth saying of a run that samples from weights that lie in parts on the ranks."""
    if not isinstance(experiment.source, FromPolicy) or experiment.engine.stage != 3:
        return None
    return (
        "engine=zero3 gathers all weights for each token that is sampled, and every rank samples every response; "
        "engine=zero2, where it fits, samples each response once and gathers nothing"
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
