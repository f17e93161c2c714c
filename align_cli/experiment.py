"""An experiment: the parts that a checked configuration asks for, and what follows from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from align_cli import advantages, columns, rewards
from align_cli.config import Tree
from align_cli.data.options import Data
from align_cli.divergences import Divergence
from align_cli.engine import EngineOptions, Optimizer
from align_cli.models.adapters import Adapter
from align_cli.models.causal import Model
from align_cli.preferences import strict_pairs
from align_cli.proposal import Adaptive
from align_cli.raters import FromEnsemble, Models, Scorer
from align_cli.reinforcement import AdaptiveKL, FixedKL
from align_cli.sections import Checkpoint, Contrast, Eval, Launch, Moments, Reference, Run, Train
from align_cli.sources import FromDataset, FromKept, FromPolicy
from align_cli.tracking import Track
from align_cli.world import World

Loss = Callable[..., Tensor]

FEATURED = ("features",)  # given by rollouts whose target asks for them
DISAGREED = ("spread",)  # given by rollouts that several reward models rate


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
