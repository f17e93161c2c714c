"""Combinations of parts and settings that compute nothing or cannot run, each refused with how to fix it.

Each function returns a sentence for each problem; the parts by themselves have been checked before.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from align_cli import columns, config
from align_cli.config import Tree

Loss = Callable[..., Tensor]

OF_SAMPLES = ("rollout", "replay")
"""Sources whose responses are sampled from a policy."""
PROBABILITIES = ("pointwise", "classifier")
"""Targets that weigh a response by its rating."""
OF_RESPONSES = ("leave_one_out", "group")
"""Advantages that a response has as a whole, from the prompt's other responses."""
OF_TOKENS = ("gae", "greedy", "to_go")
"""Advantages that each token has for itself; what a plugin's are, its author knows."""
CANCELLING = (*OF_RESPONSES, "greedy")
"""Advantages that stay as they are when all ratings of a prompt are shifted."""


def of_parts(tree: Tree, loss: Loss, link: Any) -> list[str]:
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
    links = "divergence" in config.options(loss) and "target" not in asked  # f-DPO's use of one
    if link is not None and links and not link.links:
        problems.append(
            f"algo={algorithm} divergence={tree['divergence']['name']}: its f' is finite at 0, so the optimal policy "
            "may leave responses out and the reward is not a function of π/π_ref."
        )
    # Where neither key tells, the rows themselves do (`align_cli.data.store`).
    rolls = tree["source"]["name"] in OF_SAMPLES
    given = tree["source"]["samples"] if rolls else data["responses"] or (data["expected"] or {}).get("responses", 2)
    compares = "pairs" in asked or ("rewards" in asked and "mismatch_kl" not in asked)
    if compares and given == 1:
        gives = "source.samples=1" if rolls else f"data={data['name']} data.responses={config.shown(data['responses'])}"
        problems.append(
            f"algo={algorithm} compares the responses of a prompt; {gives} gives one. "
            f"{'Use source.samples=2.' if rolls else 'Use data with several, or algo=sft.'}"
        )
    elif "pairs" in asked and data["pairs"] is None and given != 2 and not rolls:
        problems.append(
            f"algo={algorithm} compares two responses; data={data['name']} gives {given}. Choose "
            "data.pairs=best_random, best_worst or all (each response is scored once), or data.responses=2."
        )
    if "pairs" in asked and reward == "smoothed":
        problems.append(
            f"algo={algorithm} reward=smoothed: {algorithm} sees only which response is preferred. Its own smoothing "
            "is algo=cdpo or algo=robust_dpo."
        )
    if _imitates(asked) and data["responses"] != 1:
        problems.append(
            f"algo={algorithm} learns one response of each prompt; data.responses={config.shown(data['responses'])}. "
            "data.responses=1 keeps the best."
        )
    if "mismatch_kl" in asked and reward == "hard" and tree["algo"].get("threshold", -1) >= 0:
        problems.append(
            f"algo={algorithm} reward=hard: the best response of a prompt has 0 and the others −∞, none of them above "
            f"algo.threshold={tree['algo']['threshold']}, so that all would be undesirable. Use algo.threshold=-1."
        )
    if getattr(sys.modules[loss.__module__], "FINITE_REWARDS", False) and reward == "hard":
        problems.append(
            f"algo={algorithm} reward=hard: {algorithm} needs finite rewards, and the logarithm of a label of 0 is −∞. "
            "Use reward=smoothed, as EXO-pref does."
        )
    return problems


def of_source(tree: Tree, loss: Loss, link: Any) -> list[str]:
    """Combinations of where responses come from and what is asked of them that compute nothing."""
    algorithm, asked = tree["algo"]["name"], columns.asked(loss)
    source, target = tree["source"]["name"], tree.get("target")
    problems: list[str] = []
    if source not in OF_SAMPLES:
        sampled = [name for name in ("behavior", "target", "advantages") if name in asked]
        if sampled:
            problems.append(f"algo={algorithm} learns from the policy's own samples. Use source=rollout with a scorer.")
        for group in ("scorer", "target", "proposal", "advantage", "kl"):
            if tree.get(group) and not sampled:
                problems.append(
                    f"{group}={tree[group]['name']}: nothing reads it with source=dataset algo={algorithm}."
                )
        if tree["reward"]["name"] == "contrastive":
            problems.append(
                "reward=contrastive: holds samples against those of the starting model; use source=rollout."
            )
        return problems
    if not tree.get("scorer") and "features" not in (tree.get("target") or {}):
        problems.append(
            f"source={source}: nothing says how good a sampled response is. Choose a scorer, such as scorer=matches "
            "scorer.pattern=REGEX, scorer=contains, scorer=compiles, or one of your own behind --plugin."
        )
    if tree["reference"]["name"] == "cached":
        problems.append(
            f"source={source} reference=cached: responses are new in every step, so none is found. Use "
            "reference=frozen, or reference=adapter with adapter=lora."
        )
    if "mismatch_kl" in asked or _imitates(asked):
        problems.append(f"algo={algorithm} source={source}: {algorithm} learns from a dataset. Use source=dataset.")
    if "target" in asked and not target:
        problems.append(f"algo={algorithm} needs a target: target=pointwise, rlhf, classifier or exponential.")
    if target and "target" not in asked:
        problems.append(
            f"algo={algorithm} target={target['name']}: {algorithm} has no target to choose; algo=fdpg has."
        )
    if source == "replay" and tree["source"]["keep"]:
        problems.append(
            f"source=replay source.keep=true: what it learns from is kept in {tree['source']['path']} already. "
            "Use source.keep=false."
        )
    if source == "replay" and tree.get("proposal"):
        problems.append(
            f"source=replay proposal={tree['proposal']['name']}: nothing is drawn; samples of a proposal are weighted "
            "by what was kept of it. Use proposal=null."
        )
    if tree.get("proposal") and "target" not in asked:
        problems.append(
            f"algo={algorithm} proposal={tree['proposal']['name']}: {algorithm} learns from samples of the policy "
            "itself. f-DPG alone weighs those of another distribution, and knows by its target when to renew it; "
            "use proposal=null."
        )
    if tree.get("proposal") and tree["source"]["temperature"] != 1:
        problems.append(
            f"proposal={tree['proposal']['name']} source.temperature={tree['source']['temperature']}: what is drawn "
            "and the policy are then two distributions even where the proposal has just been renewed, so that their "
            "distances to the target do not say when to renew it. Use source.temperature=1."
        )
    if target and link is not None and link.limit == math.inf and target.get("floor") == 0:
        problems.append(
            f"algo={algorithm} divergence={tree['divergence']['name']} target={target['name']}: it is infinite where "
            "the target excludes responses. target.floor=0.001 excludes none; js, tv, forward_kl, hellinger, alpha and "
            "forward_chi2 are finite."
        )
    if target and "features" in target and tree["reference"].get("path") is not None:
        problems.append(
            f"target={target['name']} reference.path={tree['reference']['path']}: λ is fitted on samples of the policy "
            "as it starts, which must be the reference. Use reference.path=null."
        )
    if target and "features" in target and tree["source"]["missing_eos_penalty"]:
        problems.append(
            f"target={target['name']} source.missing_eos_penalty={tree['source']['missing_eos_penalty']}: the target "
            "is made of the features, which the penalty does not change. Use source.missing_eos_penalty=0."
        )
    if target and tree["reward"]["name"] in ("hard", "smoothed"):
        problems.append(
            f"algo={algorithm} reward={tree['reward']['name']}: a label depends on the prompt's other samples, and a "
            "target does not. Use reward=given."
        )
    if target and target["name"] in PROBABILITIES:
        scorer = (tree.get("scorer") or {}).get("name")
        if scorer in ("model", "ensemble"):
            problems.append(
                f"target={target['name']} scorer={scorer}: a reward model's scores are not numbers between 0 and 1. "
                "target=rlhf takes them."
            )
        if tree["source"]["missing_eos_penalty"]:
            problems.append(
                f"target={target['name']} source.missing_eos_penalty={tree['source']['missing_eos_penalty']}: ratings "
                "are weights between 0 and 1 here. Use source.missing_eos_penalty=0."
            )
    samples = tree["source"]["samples"]
    if tree["algo"].get("baseline") == "leave_one_out" and samples == 1:
        problems.append(
            f"algo={algorithm} source.samples=1: a prompt has no other responses to compare with. "
            "source.samples=2 or more, or algo.baseline=none."
        )
    if (target or {}).get("normaliser") == "prompt" and samples == 1:
        problems.append(
            "source.samples=1 target.normaliser=prompt: a prompt's Z would be estimated from the sample that it "
            "normalises. Use source.samples=2 or more, or target.normaliser=shared."
        )
    return problems + _of_advantages(tree, asked)


def _of_advantages(tree: Tree, asked: list[str]) -> list[str]:
    """What reinforcement learning cannot do."""
    algorithm = tree["algo"]["name"]
    advantage = (tree.get("advantage") or {}).get("name")
    reward, kl, samples = tree["reward"]["name"], tree.get("kl"), tree["source"]["samples"]
    problems: list[str] = []
    if "advantages" not in asked:
        for group in ("advantage", "kl"):
            if tree.get(group):
                problems.append(f"algo={algorithm} {group}={tree[group]['name']}: {algorithm} has no advantages.")
        if reward == "contrastive":
            problems.append(
                f"algo={algorithm} reward=contrastive: {algorithm} compares responses of one prompt, or normalises "
                "over them: what they have in common means nothing to it. algo=ppo and reinforce_pp look at it."
            )
        return problems
    if advantage is None:
        return [f"algo={algorithm} needs an advantage: advantage=gae, leave_one_out, group, greedy or to_go."]
    if "returns" in asked and advantage != "gae":
        problems.append(f"algo={algorithm} advantage={advantage}: its critic learns from advantage=gae.")
    if "returns" not in asked and advantage == "gae":
        problems.append(f"algo={algorithm} advantage=gae: {algorithm} has no critic; algo=ppo has.")
    if "policy" in asked and advantage in OF_TOKENS:
        problems.append(
            f"algo={algorithm} advantage={advantage}: {algorithm} takes one advantage for a whole response, as "
            "advantage=leave_one_out and group give. algo=reinforce_pp and remax take one for each token."
        )
    if reward in ("hard", "smoothed"):
        problems.append(
            f"algo={algorithm} reward={reward}: the logarithm of a label is not a reward to be earned. Use "
            "reward=given or contrastive."
        )
    if advantage in OF_RESPONSES and samples == 1:
        problems.append(
            f"advantage={advantage} source.samples=1: a prompt has no other responses to compare with. "
            "Use source.samples=2 or more."
        )
    if advantage in CANCELLING and reward == "contrastive":
        problems.append(
            f"advantage={advantage} reward=contrastive: what is taken from all ratings of a prompt cancels in it, so "
            "nothing would change. advantage=gae and to_go look at it."
        )
    if advantage == "group" and kl:
        problems.append(
            f"advantage=group kl={kl['name']}: nothing reads the penalty; algo=grpo has its own, algo.beta."
        )
    if "reference_tokens" in asked and kl and kl["beta"] and tree["algo"].get("beta"):
        problems.append(
            f"algo={algorithm} kl={kl['name']}: algo.beta={tree['algo']['beta']} and kl.beta={kl['beta']} would both "
            "penalise the KL. Set one of them to 0."
        )
    if kl and kl["name"] == "adaptive" and (most := samples * tree["train"]["prompts"]) >= 5 * kl["horizon"]:
        problems.append(
            f"kl=adaptive kl.horizon={kl['horizon']}: a step has {most} responses, five times as many or more, so "
            f"that one step could bring β to 0. Use kl.horizon={most} or more."
        )
    if advantage != "group" and not kl:
        problems.append(f"algo={algorithm} advantage={advantage} needs a penalty: kl=fixed or adaptive.")
    return problems


def _imitates(asked: list[str]) -> bool:
    """Whether a loss makes tokens more likely without asking how good they are."""
    return "policy_tokens" in asked and not {"pairs", "rewards", "advantages"} & set(asked)


def of_scores(sections: Mapping[str, Any], tree: Tree, loss: Loss) -> list[str]:
    """What makes no sense where a reward model is trained."""
    algorithm, asked = tree["algo"]["name"], columns.asked(loss)
    if "scores" not in asked:
        return []
    problems: list[str] = []
    others = [name for name in asked if name == "reference" or name in columns.POLICY - {"scores"}]
    if others:
        problems.append(
            f"algo={algorithm} asks for 'scores' and for '{others[0]}'; a reward model gives scores and no "
            "log-probabilities. Ask for one of the two."
        )
    if tree["source"]["name"] in OF_SAMPLES:
        problems.append(
            f"algo={algorithm} source={tree['source']['name']}: a reward model learns from responses that are there, "
            "it writes none. Use source=dataset."
        )
    if tree["reference"]["name"] != "cached":
        problems.append(
            f"algo={algorithm} reference={tree['reference']['name']}: a reward model has no reference. Leave it out."
        )
    if sections["model"].head == "plain":
        problems.append(
            f"algo={algorithm} model.head=plain: a reward model has no output head over tokens. Leave it out."
        )
    if sections["adapter"].bits is not None:
        problems.append(
            f"algo={algorithm} adapter=qlora: the head of a reward model is not a layer for 4 bits. Use adapter=lora."
        )
    return problems


def of_settings(sections: Mapping[str, Any], tree: Tree) -> list[str]:
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
        problems.append(f"optimizer.betas={sections['optimizer'].betas}: give two numbers.")
    elif any(beta == 1 for beta in sections["optimizer"].betas):
        problems.append(f"optimizer.betas={sections['optimizer'].betas}: a decay of 1 never forgets; use less than 1.")
    reference = tree["reference"]
    if reference["name"] != "frozen" and reference.get("path") is not None:
        problems.append(
            f"reference={reference['name']} reference.path={reference['path']}: its weights are the policy's own. "
            "reference=frozen takes other weights."
        )
    if sections["data"].path is None:
        problems.append(
            f"data.path=null: data={sections['data'].name} has no rows of its own; give a file, folder or hub id."
        )
    if "world" in (tree["model"]["path"], tree["data"]["path"]) and tree.get("world") is None:
        problems.append("data=toy comes from the embedded world, which model=tiny brings; add world=addition.")
    return problems
