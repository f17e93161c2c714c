"""From a composed configuration to an experiment: all that is wrong with it is said, then its parts are built."""

import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from align_cli import advantages, columns, config, refusals, resources, rundir
from align_cli.config import Tree
from align_cli.errors import UserError
from align_cli.experiment import DISAGREED, FEATURED, Choice, Experiment, Loss
from align_cli.normaliser import LogZ
from align_cli.preferences import strict_pairs
from align_cli.ranges import NotEmpty
from align_cli.raters import FromEnsemble
from align_cli.reinforcement import FixedKL, TokenRewards, Whitened, summed
from align_cli.sections import (
    PARTS,
    PENALTIES,
    PROPOSALS,
    RATERS,
    SECTIONS,
    SOURCES,
    Contrast,
    Feature,
    Fitted,
    Moments,
    Normalised,
    Reference,
    Whitening,
)
from align_cli.sources import FromPolicy
from align_cli.world import World

GIVEN = ("ratings", "lengths", "mask", "batch", *columns.POLICY)
SAMPLED = ("behavior", "behavior_tokens", "greedy", "baselines")  # given by rollouts alone
ASKED = {"scorer": NotEmpty, "moment": float}  # of each feature, beside the scorer's options
SHOWN = "target.features.NAME={scorer: matches, pattern: '^hmm', moment: 0.5}"


def read(tree: Tree, *, planned: bool = False) -> Experiment:
    """Check a composed configuration and build its parts; nothing is loaded.

    Args:
        planned: it is looked at and not run, so that a large model may be meant for GPUs that this machine has not.

    engine=auto becomes the engine of the run that run.dir holds; else plain PyTorch for one rank, and for several the
    lowest ZeRO stage that fits. A model of the hub without a revision has the one that this run began with.

    Raises:
        UserError: all that is wrong with it, a sentence for each problem; or the model's memory cannot be planned.
    """
    begun = _begun(tree)
    engine, model = _section(tree, "engine"), _section(tree, "model")
    if engine.get("name") == "auto" or engine.get("micro_tokens") == "auto":
        tree = {**tree, "engine": _begun_on(tree, engine, begun)}
    if model.get("revision", "") is None and _section(begun, "model").get("path") == model.get("path"):
        tree = {**tree, "model": {**model, "revision": _section(begun, "model").get("revision")}}
    if _section(tree, "engine").get("micro_tokens") != "auto":
        return _staged(tree, planned)
    return resources.roomy(_staged(_with(tree, micro_tokens=resources.BUDGET), planned))


def _staged(tree: Tree, planned: bool) -> Experiment:
    """`read` where the tokens of a micro-batch are a number."""
    if _section(tree, "engine").get("name") != "auto":
        return _read(tree, planned)
    several = _read(_with(tree, name="zero1"), planned)
    if resources.devices(several) == 1:
        return replace(
            _read(_with(tree, name="torch"), planned), choice=Choice("engine=torch: there is one rank", fits=True)
        )
    if several.model.path == "world":
        return replace(several, choice=Choice("engine=zero1: the embedded world's model is small", fits=True))
    return resources.lowest(several, resources.shape_of(several))


def _with(tree: Tree, **settings: Any) -> Tree:
    """The configuration with other settings of its engine."""
    return {**tree, "engine": {**tree["engine"], **settings}}


def _begun(tree: Tree) -> Tree:
    """The configuration of the run that run.dir holds; {} where it holds none."""
    run_dir = _section(tree, "run").get("dir")
    if not isinstance(run_dir, str) or not (Path(run_dir) / rundir.CONFIG).is_file():
        return {}
    return rundir.read_config(Path(run_dir))


def _begun_on(tree: Tree, engine: Mapping[str, Any], there: Tree) -> Mapping[str, Any]:
    """The section `engine` as the run that run.dir holds has settled what is left open, if it has as many ranks."""
    if not there or _section(there, "launch").get("devices") != _section(tree, "launch").get("devices"):
        return engine
    begun = _section(there, "engine")
    return {**engine, **{key: begun[key] for key in _OPEN if engine.get(key) == "auto" and key in begun}}


_OPEN = ("name", "micro_tokens")


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
    """The scorers that are functions of texts."""
    return [name for name in config.group_names()["scorer"] if name not in RATERS]


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
