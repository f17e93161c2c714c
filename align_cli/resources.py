"""What an experiment needs of the machines that it is for, and the engine that fits them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from align_cli import memory
from align_cli.errors import UserError
from align_cli.experiment import Choice, Experiment
from align_cli.raters import FromEnsemble, Models
from align_cli.sources import FromPolicy

BUDGET = 4096  # tokens of a micro-batch where nothing says more
BUDGETS = tuple(1024 * 2**power for power in range(7))  # beyond 65,536 tokens a GPU gains nothing
MARGIN = 0.1  # share of a device's memory that a chosen stage leaves to buffers, fragments and the driver


def roomy(experiment: Experiment) -> Experiment:
    """The experiment with the largest micro-batches that leave `MARGIN` of a GPU's memory free.

    On a CPU larger ones than `BUDGET` are no faster; nor are smaller ones, if a step has several.
    """
    if not on_gpu(experiment) or experiment.model.path == "world":
        return experiment
    try:
        shape = shape_of(experiment)
    except UserError:  # its memory cannot be planned
        return experiment
    there = (1 - MARGIN) * room(experiment)[0]
    tried = [_on(experiment, micro_tokens=tokens) for tokens in BUDGETS]
    fitting = [other for other in tried if sum(terms(other, shape).values()) <= there]
    chosen = fitting[-1] if fitting else tried[0]
    if chosen.choice is None:
        return chosen
    told = f"{chosen.choice.reason}; micro-batches of {chosen.engine.micro_tokens:,} tokens"
    return replace(chosen, choice=replace(chosen.choice, reason=told))


def lowest(experiment: Experiment, shape: memory.Shape) -> Experiment:
    """The experiment at the lowest ZeRO stage whose planned memory leaves `MARGIN` of a device free.

    Where none does, it is the stage that needs least. 4-bit weights cannot be partitioned, which stage 3 would do, and
    DeepSpeed's stage 0 has no fp32 sums of bfloat16 gradients.
    """
    there, source = room(experiment)
    first, last = 0 if experiment.engine.precision == "fp32" else 1, 4 if experiment.adapter.bits is None else 3
    stages = ("zero0", "zero1", "zero2", "zero3")[first:last]
    found = {name: _on(experiment, name=name) for name in stages}
    needed = {name: sum(terms(other, shape).values()) for name, other in found.items()}
    fitting = [name for name in stages if needed[name] <= (1 - MARGIN) * there]
    chosen = fitting[0] if fitting else min(stages, key=lambda name: needed[name])
    free = f"{there / 1e9:.1f} GB a {'GPU' if on_gpu(experiment) else 'rank'} ({source})"
    before = stages[stages.index(chosen) - 1]
    if not fitting:
        told = f"no stage needs less than its {needed[chosen] / 1e9:.1f} of {free}"
    elif chosen == stages[0]:
        told = f"it needs {needed[chosen] / 1e9:.1f} of {free}"
    else:
        kept = "" if needed[before] > there else f", of which {MARGIN:.0%} are left free"
        told = f"{before} would need {needed[before] / 1e9:.1f} of {free}{kept}"
    choice = Choice(f"engine={chosen}: {told}", fits=needed[chosen] <= there)
    return replace(found[chosen], choice=choice)


def _on(experiment: Experiment, **settings: Any) -> Experiment:
    """The experiment with other settings of its engine."""
    tree = {**experiment.tree, "engine": {**experiment.tree["engine"], **settings}}
    return replace(experiment, tree=tree, engine=replace(experiment.engine, **settings))


def needs_gpu(experiment: Experiment) -> list[str]:
    """What the experiment asks for that only a GPU has, or another GPU, where there is none."""
    if torch.cuda.is_available():
        launch, there = experiment.launch, torch.cuda.device_count()
        ranks = launch.devices if launch.name == "local" and launch.accelerator != "cpu" else None
        if ranks is None or ranks <= there:
            return []
        return [f"launch.devices={ranks}: PyTorch sees {there} GPU(s) here, and each rank needs its own."]
    problems: list[str] = []
    if experiment.launch.accelerator == "gpu":
        problems.append("launch.accelerator=gpu: this machine has no GPU that PyTorch can use. Use auto or cpu.")
    if experiment.adapter.bits is not None:
        problems.append("adapter=qlora: 4-bit weights need a GPU; this machine has none. Use adapter=lora.")
    return problems


def devices(experiment: Experiment) -> int:
    """How many ranks the run has."""
    if experiment.launch.devices is not None:
        return experiment.launch.devices
    on_gpu = experiment.launch.accelerator != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu and experiment.engine.name != "torch" else 1


def on_gpu(experiment: Experiment) -> bool:
    """Whether the run is for GPUs: this machine has one, or others will run it and its model's YAML tells its size."""
    if experiment.launch.accelerator != "auto":
        return experiment.launch.accelerator == "gpu"
    return torch.cuda.is_available() or (experiment.elsewhere and experiment.model.architecture is not None)


def dtype(experiment: Experiment) -> torch.dtype:
    """The type of weights and activations where a plan is for."""
    return experiment.engine.dtype(torch.device("cuda" if on_gpu(experiment) else "cpu"))


def room(experiment: Experiment) -> tuple[float, str]:
    """Bytes of memory that a rank has, and where the figure comes from."""
    here = min(devices(experiment), _node(experiment))
    return memory.device_bytes(experiment.launch.memory_gb, gpu=on_gpu(experiment), ranks=here)


def _node(experiment: Experiment) -> int:
    """Ranks of one node; where the nodes are elsewhere, as many as there are GPUs here, or 8."""
    if experiment.launch.name == "local":
        return devices(experiment)
    return torch.cuda.device_count() or 8


def sizes(experiment: Experiment) -> dict[str, float]:
    """Mean sizes of the data as its YAML states them: prompts, tokens of a prompt and of a response, K."""
    data = experiment.data
    expected = data.expected or {}
    if isinstance(experiment.source, FromPolicy):  # a response has at most so many tokens
        drawn = {"responses": experiment.source.samples, "response_tokens": experiment.source.max_new_tokens}
        return {**expected, **{name: float(value) for name, value in drawn.items()}}
    kept = data.responses or expected.get("responses", 2)
    if experiment.pairwise and data.pairs in ("best_random", "best_worst"):
        kept = 2
    return {**expected, "responses": float(min(kept, expected.get("responses", kept)))}


def shape_of(experiment: Experiment) -> memory.Shape:
    """The sizes of the network that trains."""
    return memory.shape(experiment.model, experiment.adapter, scores=experiment.scalar == "scores")


def terms(experiment: Experiment, shape: memory.Shape) -> dict[str, float]:
    """Bytes on one device, by term (`align_cli.memory`)."""
    size = sizes(experiment)
    share, sequence, repeated = 1.0, None, 1.0
    if "prompt_tokens" in size:
        sequence = size["prompt_tokens"] + size["response_tokens"]
        responses = size["responses"] * size["response_tokens"]
        share = responses / (responses + size["prompt_tokens"])
        if experiment.model.rows in ("auto", "shared"):
            repeated = (size["prompt_tokens"] + size["responses"] * sequence) / (size["prompt_tokens"] + responses)
    return memory.per_device(
        shape,
        experiment.engine,
        dtype=dtype(experiment),
        gpu=on_gpu(experiment),
        ranks=devices(experiment),
        node=_node(experiment),
        response_share=share,
        sequence=sequence,
        repeated=repeated,
        plain_head=experiment.model.head == "plain",
        scores=experiment.scalar == "scores",
        raters=_raters_at_once(experiment),
        sampled=_sampled_at_a_time(experiment, size),
        frozen_reference=experiment.frozen_reference,
        frozen_bits=experiment.adapter.bits,
        proposal=experiment.proposal is not None,
    )


def _raters_at_once(experiment: Experiment) -> int:
    """Reward models that lie on a device at a time."""
    scorer = experiment.scorer
    if not isinstance(scorer, Models):
        return 0
    apart = isinstance(scorer, FromEnsemble) and scorer.apart and on_gpu(experiment) and experiment.engine.stage != 3
    return 1 if apart else len(scorer.paths)


def _sampled_at_a_time(experiment: Experiment, size: Mapping[str, float]) -> int:
    """Tokens of the sequences that a rank samples at a time, as far as the data's YAML states its size."""
    source = experiment.source
    if not isinstance(source, FromPolicy):
        return 0
    sequences = min(source.sequences, source.samples * experiment.train.prompts)
    return round(sequences * (size.get("prompt_tokens", 0.0) + source.max_new_tokens))
