"""An experiment: the checked configuration, its parts, the combinations that have no meaning, the engine that fits."""

import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from align_cli import advantages, columns, config, memory, refusals, rewards, rundir
from align_cli.config import Tree
from align_cli.data.options import Data
from align_cli.divergences import Divergence
from align_cli.engine import EngineOptions, Optimizer
from align_cli.errors import UserError
from align_cli.models.adapters import Adapter
from align_cli.models.causal import Model
from align_cli.normaliser import LogZ
from align_cli.preferences import strict_pairs
from align_cli.proposal import Adaptive
from align_cli.ranges import NotEmpty
from align_cli.raters import FromEnsemble, Models, Scorer
from align_cli.reinforcement import AdaptiveKL, FixedKL, TokenRewards, Whitened, summed
from align_cli.sections import (
    PARTS,
    PENALTIES,
    PROPOSALS,
    RATERS,
    SECTIONS,
    SOURCES,
    Checkpoint,
    Contrast,
    Eval,
    Feature,
    Fitted,
    Launch,
    Moments,
    Normalised,
    Reference,
    Run,
    Train,
    Whitening,
)
from align_cli.sources import FromDataset, FromKept, FromPolicy
from align_cli.tracking import Track
from align_cli.world import World

Loss = Callable[..., Tensor]

BUDGET = 4096  # tokens of a micro-batch where nothing says more
BUDGETS = tuple(1024 * 2**power for power in range(7))  # beyond 65,536 tokens a GPU gains nothing
MARGIN = 0.1  # share of a device's memory that a chosen stage leaves to buffers, fragments and the driver
GIVEN = ("ratings", "lengths", "mask", "batch", *columns.POLICY)
SAMPLED = ("behavior", "behavior_tokens", "greedy", "baselines")  # given by rollouts alone
FEATURED = ("features",)  # given by rollouts whose target asks for them
DISAGREED = ("spread",)  # given by rollouts that several reward models rate
ASKED = {"scorer": NotEmpty, "moment": float}  # of each feature, beside the scorer's options
SHOWN = "target.features.NAME={scorer: matches, pattern: '^hmm', moment: 0.5}"


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
        elsewhere: whether other machines than this one will run it: it is planned, or prepared for them.
        loss: the algorithm, a function of columns.
        at_reference: the exact value of the loss while the policy is the reference, a function of columns; None
            for a loss without a reference.
        reward: makes `rewards`.
        source: where responses come from.
        scorer: rates sampled responses; None where the data does, or the first of the target's features.
        moments: of the target's features; None where it is not made of such.
        target: makes `target`; None where there is none.
        normaliser: "shared" or "prompt", of the target.
        divergence: that the loss takes; None where it takes none.
        proposal: what responses are drawn from; None: the policy as it is.
        advantage: makes `raw_advantages`; None where there are none.
        whiten: whether advantages are brought to mean 0 and deviation 1 over a step.
        kl: the penalty in what tokens earn; None where there is none.
        contrast: with how many responses of the starting model a response is compared, and how; None: with none.
        beta: the scale of implicit rewards; 1 where the algorithm has none.
        clip: how far the algorithm leads a probability ratio from 1; infinite where it has no such limit.
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
    source: FromDataset | FromPolicy
    scorer: Scorer | Models | None
    moments: Moments | None
    target: Loss | None
    normaliser: Literal["shared", "prompt"]
    divergence: Divergence | None
    proposal: Adaptive | None
    advantage: Loss | None
    whiten: bool
    kl: FixedKL | AdaptiveKL | None
    contrast: Contrast | None
    beta: float
    clip: float
    made: tuple[str, ...]
    choice: Choice | None
    elsewhere: bool

    @property
    def on_policy(self) -> bool:
        """Whether responses are drawn from the very policy that learns from them."""
        return self.starts_on_policy and self.proposal is None

    @property
    def starts_on_policy(self) -> bool:
        """Whether the first step is drawn from the very policy that learns from it: a proposal starts as the policy."""
        source = self.source
        if not isinstance(source, FromPolicy) or isinstance(source, FromKept):
            return False
        return source.temperature == 1 or self.tempered

    @property
    def tempered(self) -> bool:
        """Whether the policy that learns is the one at the sampler's temperature; f-DPG weighs the difference."""
        drawn = isinstance(self.source, FromPolicy) and self.source.temperature != 1
        return drawn and "advantages" in self.made

    @property
    def remembers(self) -> bool:
        """Whether the policy is measured once more, before the first of several updates or for its critic."""
        if not isinstance(self.source, FromPolicy):
            return False
        asked = columns.asked(self.loss)
        again = self.source.updates > 1 and ("behavior" in asked or "behavior_tokens" in asked)
        return (again and self.on_policy) or self.scalar == "values"

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The columns that samples of held-out prompts are told by."""
        wanted = ("reference_tokens", "reference", "target", "log_z", *self.target_asks)
        return tuple(name for name in self.made if name in wanted)

    @property
    def target_asks(self) -> tuple[str, ...]:
        """The columns that the target is made of."""
        return () if self.target is None else tuple(columns.asked(self.target))

    @property
    def beside(self) -> tuple[str, ...]:
        """The columns that a source of samples gives beside the responses and their ratings."""
        asked = [
            name
            for part in (self.advantage, self.reward, self.target)
            if part is not None
            for name in columns.asked(part)
        ]
        given = tuple(name for name in dict.fromkeys(asked) if name in ("greedy", "baselines", *FEATURED))
        return (*given, *DISAGREED) if isinstance(self.scorer, FromEnsemble) else given

    @property
    def algorithm(self) -> str:
        """The name of the loss."""
        return self.tree["algo"]["name"]

    @property
    def pairwise(self) -> bool:
        """Whether the loss compares two responses, so that a prompt without a strict preference teaches nothing."""
        return "pairs" in self.made

    @property
    def labelled(self) -> bool:
        """Whether rewards are labels of the best response, of which a prompt that is rated alike has none."""
        return self.tree["reward"]["name"] in rewards.LABELS

    @property
    def per_token(self) -> bool:
        """Whether the loss is an average over response tokens and not over prompts."""
        return "policy_tokens" in columns.asked(self.loss)

    @property
    def scalar(self) -> Literal["scores", "values"] | None:
        """What the network's scalar head reads: it is a reward model, or a policy with a critic; None: it has none."""
        asked = columns.asked(self.loss)
        return "scores" if "scores" in asked else "values" if "values" in asked else None

    @property
    def alone(self) -> bool:
        """Whether the network that trains is the only model, and computes with no weights but the trained ones."""
        return not self.frozen_reference and not isinstance(self.scorer, Models) and self.proposal is None

    @property
    def frozen_reference(self) -> bool:
        """Whether a second model lies beside the policy."""
        return "reference" in self.made and self.reference.name == "frozen"


def read(tree: Tree, *, planned: bool = False) -> Experiment:
    """Check a composed configuration and build its parts; nothing is loaded.

    Args:
        planned: it is looked at and not run, so that a large model may be meant for GPUs that this machine has not.

    engine=auto becomes the engine of the run that run.dir holds; else plain PyTorch for one rank, and for several the
    lowest ZeRO stage that fits.

    Raises:
        UserError: all that is wrong with it, a sentence for each problem; or the model's memory cannot be planned.
    """
    engine = _section(tree, "engine")
    if engine.get("name") == "auto" or engine.get("micro_tokens") == "auto":
        tree = {**tree, "engine": _begun_on(tree, engine)}
    if _section(tree, "engine").get("micro_tokens") != "auto":
        return _staged(tree, planned)
    return roomy(_staged(_with(tree, micro_tokens=BUDGET), planned))


def _staged(tree: Tree, planned: bool) -> Experiment:
    """`read` where the tokens of a micro-batch are a number."""
    if _section(tree, "engine").get("name") != "auto":
        return _read(tree, planned)
    several = _read(_with(tree, name="zero1"), planned)
    if devices(several) == 1:
        return replace(
            _read(_with(tree, name="torch"), planned), choice=Choice("engine=torch: there is one rank", fits=True)
        )
    if several.model.path == "world":
        return replace(several, choice=Choice("engine=zero1: the embedded world's model is small", fits=True))
    return lowest(several, shape_of(several))


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
    tree = _with(experiment.tree, **settings)
    return replace(experiment, tree=tree, engine=replace(experiment.engine, **settings))


def _read(tree: Tree, planned: bool) -> Experiment:
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
    source = SOURCES.get(str(_section(tree, "source").get("name")))
    if source is None:
        problems.append(f"source={config.shown(tree.get('source'))}: use source=dataset, rollout or replay.")
    else:
        problems += config.check(source, tree["source"], "source")
    if tree.get("resume") not in ("auto", "never"):
        problems.append(f"resume={config.shown(tree.get('resume'))}: use auto or never.")

    loss = _find(tree, "algo", "align_cli.losses", problems)
    divergence = _find(tree, "divergence", "align_cli.divergences", problems) if tree.get("divergence") else None
    reward = _find(tree, "reward", "align_cli.rewards", problems)
    target = _find(tree, "target", "align_cli.targets", problems) if tree.get("target") else None
    featured = target is not None and "features" in columns.asked(target)
    features: dict[str, Feature] = {}
    if featured:
        features = _features(tree["target"].get("features"), problems)
        tree = {**tree, "scorer": None}  # features rate the samples
    scorer = RATERS.get(str(_section(tree, "scorer").get("name")))
    if scorer is None and tree.get("scorer"):
        scorer = _find(tree, "scorer", "align_cli.scorers", problems)
    advantage = _find(tree, "advantage", "align_cli.advantages", problems) if tree.get("advantage") else None
    penalty = PENALTIES.get(str(_section(tree, "kl").get("name")))
    proposal = PROPOSALS.get(str(_section(tree, "proposal").get("name")))
    if tree.get("proposal") and proposal is None:
        problems.append(f"proposal={config.shown(tree['proposal'])}: use proposal=adaptive or null.")
    elif proposal is not None:
        problems += config.check(proposal, tree["proposal"], "proposal")
    if tree.get("kl") and penalty is None:
        problems.append(f"kl={config.shown(tree['kl'])}: use kl=fixed or adaptive.")
    elif penalty is not None:
        problems += config.check(penalty, tree["kl"], "kl")
    if scorer is not None:
        problems += config.check(scorer, _scorer_options(tree), "scorer")
    if target is not None:
        aim = {key: value for key, value in tree["target"].items() if not featured or key != "features"}
        problems += _check_both(target, Fitted if featured else Normalised, {"target": aim}, "target")
    if advantage is not None:
        problems += _check_both(advantage, Whitening, tree, "advantage")
    if loss is not None:
        injected = [name for name in ("divergence",) if name in config.options(loss)]
        problems += config.check(loss, _options(tree["algo"]), "algo", injected=injected)
    if _section(tree, "data").get("format") == "auto":
        _find(tree, "data", "align_cli.data", problems, function="record")
    if divergence is not None:
        problems += config.check(divergence, _options(tree["divergence"]), "divergence")
    if reward is not None and "baselines" in columns.asked(reward):
        problems += _check_both(reward, Contrast, tree, "reward")
    elif reward is not None:
        problems += config.check(reward, _options(tree["reward"]), "reward")
    if problems or loss is None or reward is None or source is None:
        raise UserError("\n".join(problems))

    sections = {name: config.build(target, tree[name]) for name, target in SECTIONS.items()}
    link = None if divergence is None else config.build(divergence, _options(tree["divergence"]))
    takes_divergence = "divergence" in config.options(loss)
    problems += refusals.of_parts(tree, loss, link)
    problems += refusals.of_source(tree, loss, link)
    problems += refusals.of_scores(sections, tree, loss)
    problems += refusals.of_settings(sections, tree)
    if problems:
        raise UserError("\n".join(problems))

    given = {"divergence": link} if takes_divergence else {}
    built_loss = config.build(loss, _options(tree["algo"]), **given)
    exact = vars(importlib.import_module(loss.__module__)).get("at_reference")
    built_reward = config.build(reward, _options(tree["reward"]))
    built_target = None if target is None else config.build(target, _options(tree["target"]))
    built_advantage = None if advantage is None else config.build(advantage, _options(tree["advantage"]))
    asked = columns.asked(built_loss)
    makers = _signatures(
        built_reward, built_target, built_advantage, penalty is not None or "reference_tokens" in asked
    )
    rolls = issubclass(source, FromPolicy)
    wanted = [*asked, *(["reference"] if rolls else [])]  # samples are told by how far they went
    remembered = ["old_values"] if "values" in asked else []
    try:
        sampled = (*SAMPLED, *remembered, *(FEATURED if featured else ()))
        sampled += DISAGREED if scorer is FromEnsemble else ()
        made = columns.plan(wanted, (*GIVEN, *sampled) if rolls else GIVEN, makers)
    except ValueError as error:
        there = ", ".join(dict.fromkeys([*GIVEN, *makers]))
        raise UserError(f"algo={tree['algo']['name']}: {error} There are {there}.") from error
    return Experiment(
        tree=tree,
        loss=built_loss,
        at_reference=None if exact is None else config.build(exact, _options(tree["algo"]), **_only(exact, given)),
        reward=built_reward,
        source=config.build(source, tree["source"]),
        scorer=None if scorer is None else config.build(scorer, _scorer_options(tree)),
        moments=Moments(features, tree["target"]["samples"], tree["target"]["normaliser"]) if featured else None,
        target=built_target,
        normaliser=_section(tree, "target").get("normaliser", "shared"),
        divergence=link if takes_divergence else None,
        proposal=None if proposal is None else config.build(proposal, tree["proposal"]),
        advantage=built_advantage,
        whiten=_section(tree, "advantage").get("whiten", False),
        kl=None if penalty is None else config.build(penalty, tree["kl"]),
        contrast=config.build(Contrast, tree["reward"]) if "baselines" in columns.asked(reward) else None,
        beta=float(tree["algo"]["beta"]) if "beta" in tree["algo"] else 1.0,
        clip=float(tree["algo"].get("clip", math.inf)),
        made=tuple(made),
        choice=None,
        elsewhere=planned or sections["launch"].name == "prepare",
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


def _scorer_options(tree: Tree) -> dict[str, Any]:
    """What a scorer is built from: a function's options, or the whole section of a rater that is none."""
    return dict(tree["scorer"]) if tree["scorer"]["name"] in RATERS else _options(tree["scorer"])


def _only(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in config.options(function)}


def _check_both(part: Callable[..., Any], loop: type, tree: Tree, group: str) -> list[str]:
    """What is wrong with a section whose keys are the options of a part and what the loop reads beside them."""
    section, own = _options(_section(tree, group)), config.options(loop)
    of_loop = {name: value for name, value in section.items() if name in own}
    of_part = {name: value for name, value in section.items() if name not in own}
    return config.check(part, of_part, group) + config.check(loop, of_loop, group)


def _signatures(
    reward: Loss, target: Loss | None, advantage: Loss | None, tokens: bool
) -> dict[str, Callable[..., Any]]:
    """For planning: what asks for which columns to make its own.

    Args:
        tokens: whether something asks for the reference of each token.
    """

    def alone() -> None:
        """Asks for no column."""

    found: dict[str, Callable[..., Any]] = {
        "rewards": reward,
        "pairs": strict_pairs,
        "reference": summed if tokens else alone,
        "mismatch_kl": alone,
        "token_rewards": TokenRewards(FixedKL(name="fixed", beta=0.0)).__call__,
        "advantages": Whitened(False).__call__,
        "returns": advantages.returns,
        "log_z": LogZ("shared").__call__,
        "lambdas": alone,
    }
    found |= {"reference_tokens": alone} if tokens else {}
    found |= {} if target is None else {"target": target}
    return found if advantage is None else {**found, "raw_advantages": advantage}


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


def _programs() -> list[str]:
    """The scorers that are functions of texts, without those that an example brings under its own name."""
    return [name for name in config.group_names()["scorer"] if "-" not in name and name not in RATERS]


def _features(node: Any, problems: list[str]) -> dict[str, Feature]:
    """The features of a target, as far as they are right."""
    if not isinstance(node, Mapping) or not node:
        given = "" if node in (None, config.MISSING) else f"target.features={config.shown(node)}: "
        problems.append(f"{given}a target of moments has at least one feature, as {SHOWN}.")
        return {}
    found: dict[str, Feature] = {}
    for name, options in node.items():
        key, before = f"target.features.{name}", len(problems)
        if not re.fullmatch(r"\w+", str(name)) or not isinstance(options, Mapping):
            shown = config.shown(dict(options) if isinstance(options, Mapping) else options)
            problems.append(f"{key}={shown}: give a name of letters and digits, and keys, as in {SHOWN}.")
            continue
        if not options.get("scorer") or options["scorer"] == config.MISSING:
            problems.append(f"{key}.scorer is missing: {', '.join(_programs())}, or one of your own.")
            continue
        try:
            scorer = config.find("align_cli.scorers", options["scorer"], key, told="scorer")
        except UserError as error:
            near = config.did_you_mean(str(options["scorer"]), _programs())
            problems.append(f"{error}{near}")
            continue
        problems += config.check(scorer, options, key, more=ASKED)
        if len(problems) == before:
            found[str(name)] = Feature(config.build(scorer, options), float(options["moment"]))
    return found


def _unknown_sections(tree: Tree) -> list[str]:
    known = [*SECTIONS, "reference", "world", "source", "resume", *PARTS]
    return [f"{key}: no such key.{config.did_you_mean(key, known)}" for key in tree if key not in known]


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


def shape_of(experiment: Experiment) -> memory.Shape:
    """The sizes of the network that trains."""
    return memory.shape(experiment.model, experiment.adapter, scores=experiment.scalar == "scores")


def terms(experiment: Experiment, shape: memory.Shape) -> dict[str, float]:
    """Bytes on one device, by term (`align_cli.memory`)."""
    size = sizes(experiment)
    share, sequence = 1.0, None
    if "prompt_tokens" in size:
        sequence = size["prompt_tokens"] + size["response_tokens"]
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
        sequence=sequence,
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


def column_makers(experiment: Experiment) -> dict[str, str]:
    """Who makes each column that the loss needs, for the plan."""
    tree = experiment.tree
    makers = {
        "rewards": f"reward={tree['reward']['name']}",
        "pairs": f"strict preferences of the rewards (data.pairs={tree['data']['pairs']})",
        "reference": f"reference={tree['reference']['name']}",
        "reference_tokens": f"reference={tree['reference']['name']}",
        "token_rewards": f"kl={(tree.get('kl') or {}).get('name')} on rewards",
        "raw_advantages": f"advantage={(tree.get('advantage') or {}).get('name')}",
        "advantages": "the step's mean and deviation" if experiment.whiten else "as they are",
        "returns": "raw advantages and old values",
        "target": f"target={(tree.get('target') or {}).get('name')}",
        "lambdas": "fitted before the first step, on samples of the starting model",
        "log_z": f"mean over all samples so far ({experiment.normaliser})",
        "mismatch_kl": f"policy and reference={tree['reference']['name']} on mismatched prompts and responses",
    }
    asked = columns.asked(experiment.loss)
    own = {"scores": "the reward model, with gradient", "values": "the policy's critic, with gradient"}
    table = {name: own.get(name, "the policy, with gradient") for name in asked if name in columns.POLICY}
    source = experiment.source
    table |= {name: f"data={tree['data']['name']}" for name in ("lengths", "mask") if name in asked}
    sampler = "the sampler" if experiment.proposal is None else f"proposal={experiment.proposal.name}, the sampler"
    rated = f"scorer={tree['scorer']['name']}" if tree.get("scorer") else "the first feature"
    if isinstance(source, FromKept):
        sampler = rated = f"source=replay: {source.path}"
    table |= {name: sampler for name in ("behavior", "behavior_tokens") if name in asked}
    table |= {"old_values": "the critic before the first update"} if "old_values" in asked else {}
    if experiment.contrast is not None:
        table["baselines"] = f"{experiment.contrast.responses} responses of the starting model"
    if "ratings" in asked or "rewards" in experiment.made or "target" in experiment.made:
        table["ratings"] = rated if isinstance(source, FromPolicy) else f"data={tree['data']['name']}"
    if isinstance(experiment.scorer, FromEnsemble):
        table["spread"] = f"{len(experiment.scorer.paths)} reward models"
    if experiment.moments is not None:
        scorers = (tree["target"]["features"][name]["scorer"] for name in experiment.moments.features)
        table["features"] = ", ".join(f"scorer {name}" for name in scorers)
    return table | {name: makers[name] for name in experiment.made}


def producers(experiment: Experiment) -> dict[str, Loss]:
    """The functions that make columns out of columns, by the column's name."""
    found = {"rewards": experiment.reward, "pairs": strict_pairs, "returns": advantages.returns}
    found |= {} if experiment.target is None else {"target": experiment.target}
    return found if experiment.advantage is None else {**found, "raw_advantages": experiment.advantage}
