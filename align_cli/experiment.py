"""An experiment: the checked configuration, its parts, the combinations that have no meaning, the engine that fits."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from align_cli import columns, config, memory, rundir
from align_cli.config import Tree
from align_cli.data.options import Data
from align_cli.engine import EngineOptions, Optimizer
from align_cli.errors import UserError
from align_cli.models.adapters import Adapter
from align_cli.models.causal import Model
from align_cli.preferences import strict_pairs
from align_cli.ranges import Count, Fraction, NotEmpty, Positive, WholeNumber
from align_cli.tracking import Track
from align_cli.world import World


@dataclass(frozen=True, kw_only=True)
class Train:
    """The `train` section: how long and how fast."""

    steps: Count | None
    epochs: Count
    prompts: Count
    together: bool
    lr: Positive
    schedule: Literal["cosine", "linear", "constant"]
    warmup_ratio: Fraction


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The `checkpoint` section."""

    every: Count
    keep: Count


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The `eval` section."""

    every: Count | None
    groups: WholeNumber
    samples: Count
    prompts: WholeNumber


@dataclass(frozen=True, kw_only=True)
class Run:
    """The `run` section."""

    dir: NotEmpty
    seed: WholeNumber


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The `launch` section."""

    name: Literal["local", "prepare"]
    devices: Count | None
    accelerator: Literal["auto", "cpu", "gpu"]
    memory_gb: Positive | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The `reference` section."""

    name: Literal["cached", "frozen", "adapter"]
    path: NotEmpty | None


Loss = Callable[..., Tensor]

SECTIONS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "optimizer": Optimizer,
    "checkpoint": Checkpoint,
    "eval": Eval,
    "run": Run,
    "launch": Launch,
    "data": Data,
    "model": Model,
    "adapter": Adapter,
    "engine": EngineOptions,
    "track": Track,
}
BUDGET = 4096  # tokens of a micro-batch where nothing says more
BUDGETS = tuple(1024 * 2**power for power in range(7))  # beyond 65,536 tokens a GPU gains nothing
MARGIN = 0.1  # share of a device's memory that a chosen stage leaves to buffers, fragments and the driver
GIVEN = ("ratings", "lengths", "mask", "batch", *columns.POLICY)
MADE = ("rewards", "pairs", "reference", "mismatch_kl")


@dataclass(frozen=True)
class Choice:
    """Why engine=auto has become the engine that it is.

    Attributes:
        reason: a sentence.
        fits: whether the run fits in the devices' memory, as far as it was looked at.
    """

    reason: str
    fits: bool


@dataclass(frozen=True)
class Experiment:
    """Everything that a run needs to know, from a configuration that was checked.

    Attributes:
        tree: the configuration itself, with the engine that engine=auto has become.
        choice: why it has become this one; None where the engine was named.
        loss: the algorithm, a function of columns.
        at_reference: the exact value of the loss while the policy is the reference, a function of columns; None
            for a loss without a reference.
        reward: makes `rewards`.
        beta: the scale of implicit rewards; 1 where the algorithm has none.
        made: the columns to produce, in order.
    """

    tree: Tree
    train: Train
    optimizer: Optimizer
    checkpoint: Checkpoint
    eval: Eval
    run: Run
    launch: Launch
    data: Data
    model: Model
    adapter: Adapter
    engine: EngineOptions
    track: Track
    reference: Reference
    world: World | None
    loss: Loss
    at_reference: Loss | None
    reward: Loss
    beta: float
    made: tuple[str, ...]
    choice: Choice | None

    @property
    def algorithm(self) -> str:
        """The name of the loss."""
        return self.tree["algo"]["name"]

    @property
    def pairwise(self) -> bool:
        """Whether the loss compares two responses, so that a prompt without a strict preference teaches nothing."""
        return "pairs" in self.made

    @property
    def per_token(self) -> bool:
        """Whether the loss is an average over response tokens and not over prompts."""
        return "policy_tokens" in columns.asked(self.loss)

    @property
    def frozen_reference(self) -> bool:
        """Whether a second model lies beside the policy."""
        return "reference" in self.made and self.reference.name == "frozen"


def read(tree: Tree) -> Experiment:
    """Check a composed configuration and build its parts; nothing is loaded.

    engine=auto becomes the engine of the run that run.dir holds; else plain PyTorch for one rank, and for several the
    lowest ZeRO stage that fits.

    Raises:
        UserError: all that is wrong with it, a sentence for each problem; or the model's memory cannot be planned.
    """
    engine = _section(tree, "engine")
    if engine.get("name") == "auto" or engine.get("micro_tokens") == "auto":
        tree = {**tree, "engine": _begun_on(tree, engine)}
    if _section(tree, "engine").get("micro_tokens") != "auto":
        return _staged(tree)
    return roomy(_staged(_with(tree, micro_tokens=BUDGET)))


def _staged(tree: Tree) -> Experiment:
    """`read` where the tokens of a micro-batch are a number."""
    if _section(tree, "engine").get("name") != "auto":
        return _read(tree)
    several = _read(_with(tree, name="zero1"))
    if devices(several) == 1:
        return replace(_read(_with(tree, name="torch")), choice=Choice("engine=torch: there is one rank", fits=True))
    if several.model.path == "world":
        return replace(several, choice=Choice("engine=zero1: the embedded world's model is small", fits=True))
    return lowest(several, memory.shape(several.model, several.adapter))


def _with(tree: Tree, **settings: Any) -> Tree:
    """The configuration with other settings of its engine."""
    return {**tree, "engine": {**tree["engine"], **settings}}


def _begun_on(tree: Tree, engine: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section `engine` as the run that run.dir holds has settled what is left open, if it has as many ranks."""
    run_dir = _section(tree, "run").get("dir")
    if not isinstance(run_dir, str) or not (Path(run_dir) / rundir.CONFIG).is_file():
        return engine
    there = rundir.read_config(Path(run_dir))
    if _section(there, "launch").get("devices") != _section(tree, "launch").get("devices"):
        return engine
    begun = _section(there, "engine")
    return {**engine, **{key: begun[key] for key in _OPEN if engine.get(key) == "auto" and key in begun}}


_OPEN = ("name", "micro_tokens")


def roomy(experiment: Experiment) -> Experiment:
    """The experiment with the largest micro-batches that leave `MARGIN` of a GPU's memory free.

    On a CPU larger ones than `BUDGET` are no faster; nor are smaller ones, if a step has several.
    """
    if not on_gpu(experiment) or experiment.model.path == "world":
        return experiment
    try:
        shape = memory.shape(experiment.model, experiment.adapter)
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
    tree = _with(experiment.tree, **settings)
    return replace(experiment, tree=tree, engine=replace(experiment.engine, **settings))


def _read(tree: Tree) -> Experiment:
    """`read` where the engine is named."""
    problems: list[str] = []
    problems += _unknown_sections(tree)
    for name, target in SECTIONS.items():
        if name not in tree:
            problems.append(f"{name} is missing.")
        else:
            problems += config.check(target, tree[name], name)
    reference = {"path": None, **_section(tree, "reference")}
    problems += config.check(Reference, reference, "reference")
    if tree.get("world") is not None:
        problems += config.check(World, tree["world"], "world")
    if tree.get("source") != {"name": "dataset"}:
        problems.append(f"source={config.shown(tree.get('source'))}: source=dataset would be right.")
    if tree.get("resume") not in ("auto", "never"):
        problems.append(f"resume={config.shown(tree.get('resume'))}: auto or never would be right.")

    loss = _find(tree, "algo", "align_cli.losses", problems)
    divergence = _find(tree, "divergence", "align_cli.divergences", problems) if tree.get("divergence") else None
    reward = _find(tree, "reward", "align_cli.rewards", problems)
    if loss is not None:
        injected = [name for name in ("divergence",) if name in config.options(loss)]
        problems += config.check(loss, _options(tree["algo"]), "algo", injected=injected)
    if _section(tree, "data").get("format") == "auto":
        _find(tree, "data", "align_cli.data", problems, function="record")
    if divergence is not None:
        problems += config.check(divergence, _options(tree["divergence"]), "divergence")
    if reward is not None:
        problems += config.check(reward, _options(tree["reward"]), "reward")
    if problems or loss is None or reward is None:
        raise UserError("\n".join(problems))

    sections = {name: config.build(target, tree[name]) for name, target in SECTIONS.items()}
    link = None if divergence is None else config.build(divergence, _options(tree["divergence"]))
    takes_divergence = "divergence" in config.options(loss)
    problems += _meaningless(tree, loss, link)
    problems += _meaningless_settings(sections, tree)
    if problems:
        raise UserError("\n".join(problems))

    given = {"divergence": link} if takes_divergence else {}
    built_loss = config.build(loss, _options(tree["algo"]), **given)
    exact = vars(importlib.import_module(loss.__module__)).get("at_reference")
    built_reward = config.build(reward, _options(tree["reward"]))
    producers = {name: _placeholder(name, built_reward) for name in MADE}
    try:
        made = columns.plan(columns.asked(built_loss), GIVEN, producers)
    except ValueError as error:
        there = ", ".join(dict.fromkeys([*GIVEN, *MADE]))
        raise UserError(f"algo={tree['algo']['name']}: {error} There are {there}.") from error
    return Experiment(
        tree=tree,
        loss=built_loss,
        at_reference=None if exact is None else config.build(exact, _options(tree["algo"]), **_only(exact, given)),
        reward=built_reward,
        beta=float(tree["algo"]["beta"]) if "beta" in tree["algo"] else 1.0,
        made=tuple(made),
        choice=None,
        reference=config.build(Reference, reference),
        world=None if tree.get("world") is None else config.build(World, tree["world"]),
        **sections,
    )


def placed(tree: Tree, run_dir: str) -> Tree:
    """`tree` with a run directory where it names none."""
    run = _section(tree, "run")
    return tree if run.get("dir", run_dir) is not None else {**tree, "run": {**run, "dir": run_dir}}


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}


def _options(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without the name that chooses its function."""
    return {key: value for key, value in section.items() if key != "name"}


def _only(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in config.options(function)}


def _placeholder(name: str, reward: Loss) -> Loss:
    """A producer's signature, for planning: what makes a column, not how."""
    if name == "rewards":
        return reward
    if name == "pairs":
        return strict_pairs
    return lambda: torch.empty(0)


def _find(
    tree: Tree, group: str, module: str, problems: list[str], *, function: str | None = None
) -> Callable[..., Any] | None:
    section = _section(tree, group)
    if "name" not in section:
        problems.append(f"{group}.name is missing: choose {group}=<name>.")
        return None
    try:
        return config.find(module, section["name"], group, function=function)
    except UserError as error:
        problems.append(str(error))
        return None


def _unknown_sections(tree: Tree) -> list[str]:
    known = [*SECTIONS, "reference", "world", "source", "resume", "algo", "divergence", "reward"]
    return [f"{key}: no such key.{config.did_you_mean(key, known)}" for key in tree if key not in known]


def _meaningless(tree: Tree, loss: Loss, link: Any) -> list[str]:
    """Combinations of algorithm, divergence, reward and data that compute nothing."""
    algorithm, reward, data = tree["algo"]["name"], tree["reward"]["name"], tree["data"]
    asked = columns.asked(loss)
    problems: list[str] = []
    if link is not None and "divergence" not in config.options(loss):
        problems.append(
            f"algo={algorithm} divergence={tree['divergence']['name']}: {algorithm} has no divergence to choose. "
            "f-DPO's βf'(π/π_ref) leaves a term of the prompt alone that only differences of two responses cancel; "
            "algo=f_dpo takes a divergence."
        )
    if link is None and "divergence" in config.options(loss):
        problems.append(f"algo={algorithm} needs a divergence: divergence=reverse_kl, forward_kl, js or alpha.")
    if link is not None and "divergence" in config.options(loss) and not link.links:
        problems.append(
            f"algo={algorithm} divergence={tree['divergence']['name']}: its f' is finite at 0, so the optimal policy "
            "may leave responses out and the reward is no function of π/π_ref."
        )
    # Where neither key tells, the rows themselves do (`align_cli.data.store`).
    given = data["responses"] or (data["expected"] or {}).get("responses", 2)
    compares = "pairs" in asked or ("rewards" in asked and "mismatch_kl" not in asked)
    if compares and given == 1:
        problems.append(
            f"algo={algorithm} compares the responses of a prompt; data={data['name']} data.responses="
            f"{config.shown(data['responses'])} gives one. Data with several would be right, or algo=sft."
        )
    elif "pairs" in asked and data["pairs"] is None and given != 2:
        problems.append(
            f"algo={algorithm} compares two responses; data={data['name']} gives {given}. Choose "
            "data.pairs=best_random, best_worst or all (each response is scored once), or data.responses=2."
        )
    if "pairs" in asked and reward == "smoothed":
        problems.append(
            f"algo={algorithm} reward=smoothed: {algorithm} sees only which response is preferred. Its own smoothing "
            "is algo=cdpo or algo=robust_dpo."
        )
    if "policy_tokens" in asked and "pairs" not in asked and "rewards" not in asked and data["responses"] != 1:
        problems.append(
            f"algo={algorithm} learns one response of each prompt; data.responses={config.shown(data['responses'])}. "
            "data.responses=1 keeps the best."
        )
    if algorithm == "exo" and reward == "hard":
        problems.append(
            "algo=exo reward=hard: a label of 0 makes the reverse KL infinite. Use reward=smoothed, as EXO-pref does."
        )
    return problems


def _meaningless_settings(sections: Mapping[str, Any], tree: Tree) -> list[str]:
    """Combinations of machine, model and method that cannot run."""
    launch, engine, adapter = sections["launch"], sections["engine"], sections["adapter"]
    problems: list[str] = []
    if engine.name == "torch" and launch.devices is not None and launch.devices > 1:
        problems.append(
            f"engine=torch launch.devices={launch.devices}: plain PyTorch runs in one process. "
            "Use engine=zero0, zero1, zero2, zero3, or auto for the lowest of them that fits."
        )
    if engine.name == "zero0" and engine.precision == "bf16":
        problems.append(
            "engine=zero0 engine.precision=bf16: DeepSpeed's stage 0 has no fp32 sums of bfloat16 gradients. "
            "Use engine=zero1, or engine.precision=fp32."
        )
    if adapter.bits is not None and engine.name == "zero3":
        problems.append("adapter=qlora engine=zero3: 4-bit weights cannot be partitioned. Use engine=zero2.")
    if tree["reference"]["name"] == "adapter" and adapter.rank is None:
        problems.append(
            "reference=adapter switches adapters off; there are none. Use adapter=lora or reference=cached."
        )
    if (adapter.rank is None) != (adapter.scale is None) or (adapter.rank is None) != (adapter.targets is None):
        problems.append("adapter: rank, scale and targets belong together; adapter=lora sets them.")
    if len(sections["optimizer"].betas) != 2:
        problems.append(f"optimizer.betas={sections['optimizer'].betas}: two numbers would be right.")
    elif any(beta == 1 for beta in sections["optimizer"].betas):
        problems.append(f"optimizer.betas={sections['optimizer'].betas}: a decay of 1 never forgets; below 1 is right.")
    reference = tree["reference"]
    if reference["name"] != "frozen" and reference.get("path") is not None:
        problems.append(
            f"reference={reference['name']} reference.path={reference['path']}: its weights are the policy's own. "
            "reference=frozen takes other weights."
        )
    if sections["data"].path is None:
        problems.append(
            f"data.path=null: data={sections['data'].name} has no rows of its own; a file, folder or hub id is right."
        )
    if "world" in (tree["model"]["path"], tree["data"]["path"]) and tree.get("world") is None:
        problems.append("data=toy comes from the embedded world, which model=tiny brings; add world=addition.")
    return problems


def needs_gpu(experiment: Experiment) -> list[str]:
    """What the experiment asks for that only a GPU has, where there is none."""
    if torch.cuda.is_available():
        return []
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


def sizes(experiment: Experiment) -> dict[str, float]:
    """Mean sizes of the data as its YAML states them: prompts, tokens of a prompt and of a response, K."""
    data = experiment.data
    expected = data.expected or {}
    kept = data.responses or expected.get("responses", 2)
    if experiment.pairwise and data.pairs in ("best_random", "best_worst"):
        kept = 2
    return {**expected, "responses": float(min(kept, expected.get("responses", kept)))}


def on_gpu(experiment: Experiment) -> bool:
    """Whether a plan is for GPUs: this machine has one, or the model is none that a CPU would train."""
    if experiment.launch.accelerator != "auto":
        return experiment.launch.accelerator == "gpu"
    return torch.cuda.is_available() or experiment.model.architecture is not None


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


def terms(experiment: Experiment, shape: memory.Shape) -> dict[str, float]:
    """Bytes on one device, by term (`align_cli.memory`)."""
    size = sizes(experiment)
    share = 1.0
    if "prompt_tokens" in size:
        responses = size["responses"] * size["response_tokens"]
        share = responses / (responses + size["prompt_tokens"])
    return memory.per_device(
        shape,
        experiment.engine,
        dtype=dtype(experiment),
        gpu=on_gpu(experiment),
        ranks=devices(experiment),
        node=_node(experiment),
        response_share=share,
        plain_head=experiment.model.head == "plain",
        frozen_reference=experiment.frozen_reference,
        frozen_bits=experiment.adapter.bits,
    )


def column_makers(experiment: Experiment) -> dict[str, str]:
    """Who makes each column that the loss needs, for the plan."""
    tree = experiment.tree
    makers = {
        "rewards": f"reward={tree['reward']['name']}",
        "pairs": f"strict preferences of the rewards (data.pairs={tree['data']['pairs']})",
        "reference": f"reference={tree['reference']['name']}",
        "mismatch_kl": f"policy and reference={tree['reference']['name']} on mismatched prompts and responses",
    }
    asked = columns.asked(experiment.loss)
    table = {name: "the policy, with gradient" for name in asked if name in columns.POLICY}
    table |= {name: f"data={tree['data']['name']}" for name in ("ratings", "lengths", "mask") if name in asked}
    if "rewards" in experiment.made:
        table["ratings"] = f"data={tree['data']['name']}"
    return table | {name: makers[name] for name in experiment.made}


def producers(experiment: Experiment) -> dict[str, Loss]:
    """The functions that make columns out of columns, by the column's name."""
    return {"rewards": experiment.reward, "pairs": strict_pairs}
