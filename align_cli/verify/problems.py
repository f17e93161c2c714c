"""An algorithm on the enumerable world: the data that it asks for, and the policy that it has to reach.

What an algorithm asks for is read off its signature and its configuration, so that one of a user's own is given a
problem as ours are. Beside a loss may stand a function `optimum`: of columns over all responses that there are, and of
the loss's options, it gives the log-probabilities at which the loss rests, (B, K). A loss that a common shift of all
log-probabilities leaves alone may give them up to such a shift. Beside the columns of the glossary it may ask for

    shares (B, K)     log of each response's share of the data
    tokens (B, K, T)  token ids, -1 beyond a response's end
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from align_cli import config, reading, targets
from align_cli.columns import asked
from align_cli.config import Tree
from align_cli.divergences import Divergence
from align_cli.experiment import Experiment
from align_cli.ranges import BelowHalf, NonNegative, Positive
from align_cli.verify.tables import candidates, random_parts
from align_cli.verify.world import World

Kind = Literal["pairs", "groups", "demonstrations", "samples"]

# In turn for each option of such a range: apart from each other, from their squares and inverses, and from 1.
USUAL: dict[Any, tuple[float, ...]] = {Positive: (0.8, 0.5, 0.7), NonNegative: (0.4, 0.3, 0.6), BelowHalf: (0.1, 0.2)}
PENALTY = 0.5  # β of a KL penalty on samples, of ratings whose deviation is about 1
FLOOR = 0.05  # weight that a target leaves to what it does not want, so that every divergence to it is finite
WON = ((1, 2), (1, 3), (2, 3), (2, 1), (3, 1), (3, 2))  # comparisons that each of two responses wins


@dataclass(frozen=True)
class Problem:
    """An algorithm, its data and its optimum.

    Attributes:
        label: the algorithm, and the divergence if it takes one.
        loss: a function of columns; module: where it and what stands beside it come from.
        kind: of the data.
        overrides: what `align train` is given beside model, data and run directory.
        rows: of the data, as JSON lines have them.
        columns: of the data, exactly: (P, K) or longer, float64, without the policy's own.
        places: (P, K) the response that each of the K is.
        optimum: (P, S) log-probabilities, or scores; None where nothing is proved, or no policy can reach it.
        rests: losses with different options and the (P, S) at which each rests, whether a policy can be there or not.
        keywords: of the loss, built.
        statement, source: of the optimum.
        options: of the loss.
    """

    label: str
    loss: Callable[..., Tensor]
    module: Any
    kind: Kind
    overrides: list[str]
    rows: list[dict[str, Any]]
    columns: dict[str, Tensor]
    places: Tensor
    optimum: Tensor | None
    rests: tuple[tuple[Callable[..., Tensor], Tensor], ...]
    keywords: Mapping[str, Any]
    statement: str
    source: str
    options: Mapping[str, Any]

    @property
    def own(self) -> str:
        """The column of the loss that carries the gradient, beside a critic's."""
        return next(name for name in ("policy", "policy_tokens", "scores") if name in asked(self.loss))

    def with_loss(self, loss: Callable[..., Tensor]) -> "Problem":
        """The same for the loss with other options."""
        return replace(self, loss=loss)

    def value(self, policy: Tensor) -> Tensor:
        """The expected loss of each prompt, (P,), if the responses have these log-probabilities or scores (P, S)."""
        column = policy.gather(-1, self.places)
        given = {**self.columns, self.own: column[..., None] if self.own == "policy_tokens" else column}
        elements = self.loss(*(given[name] for name in asked(self.loss)))
        return elements if elements.dim() == 1 else (elements.sum(-1) * self.columns["shares"].exp()).sum(-1)


def paper(module: Any) -> str:
    """What a loss's module says of where it comes from: its first line."""
    return " ".join((module.__doc__ or "").partition("\n\n")[0].split())


@cache
def composed(overrides: tuple[str, ...], config_dirs: tuple[str, ...]) -> Tree:
    """A configuration of `align train`, to be read and not written; each is composed once."""
    return config.compose("train", overrides, config_dirs)


def pose(world: World, name: str, divergence: str | None, config_dirs: Sequence[str]) -> Problem:
    """The problem of an algorithm.

    Args:
        divergence: of the `divergence` group, for an algorithm that takes one.

    Raises:
        UserError: the algorithm or its YAML is wrong.
    """
    chosen = [f"algo={name}", *([f"divergence={divergence}"] if divergence else [])]
    tree = composed(tuple(chosen), tuple(config_dirs))
    loss = config.find("align_cli.losses", tree["algo"]["name"], "algo")
    module = importlib.import_module(loss.__module__)
    optimum = vars(module).get("optimum")
    kind = _kind(tree, loss)
    posed = _POSE[kind](world)
    settings = [*chosen, *_settings(tree, kind)]
    label = f"{name} {divergence}" if divergence else name
    rests: list[tuple[Callable[..., Tensor], Tensor]] = []
    # Where the first options put the optimum out of reach of any policy, those that are all 1 may not.
    for options in _options(loss, optimum, kind):
        given = [*settings, *(f"algo.{key}={value}" for key, value in options.items())]
        checked = reading.read(composed((*given, *_PLACEHOLDERS), tuple(config_dirs)))
        columns = {**posed.columns, **_of_experiment(checked, world, posed.columns)}
        wanted, (statement, source) = _optimum(checked, optimum, columns)
        problem = Problem(
            label=label,
            loss=checked.loss,
            module=module,
            kind=kind,
            overrides=given,
            rows=posed.rows,
            columns=columns,
            places=posed.places,
            optimum=None,
            rests=(),
            keywords=_keywords(checked),
            statement=statement,
            source=source or paper(module),
            options=checked.tree["algo"],
        )
        if wanted is None:
            return problem
        policy = torch.zeros_like(world.start).scatter(-1, posed.places, wanted)
        if kind == "samples":  # an expected loss has no value
            return replace(problem, optimum=policy.log_softmax(-1))
        rests.append((checked.loss, policy))
        problem = replace(problem, rests=tuple(rests))
        if problem.own == "scores" or _shifts(problem, policy) or _is_distribution(policy):
            return replace(problem, optimum=policy.log_softmax(-1))
    return problem


def _keywords(checked: Experiment) -> dict[str, Any]:
    """The options of the loss as it takes them."""
    assert isinstance(checked.loss, partial)
    return dict(checked.loss.keywords)


def _is_distribution(policy: Tensor) -> bool:
    return bool((policy.logsumexp(-1).abs() < 1e-3).all())


def _shifts(problem: Problem, policy: Tensor) -> bool:
    """Whether a common shift of all log-probabilities leaves the loss alone."""
    return torch.allclose(problem.value(policy + 0.3), problem.value(policy), atol=1e-9)


# --- what an algorithm asks for


def _kind(tree: Tree, loss: Callable[..., Tensor]) -> Kind:
    if tree["source"]["name"] == "rollout":
        return "samples"
    if "pairs" in asked(loss):
        return "pairs"
    return "groups" if "rewards" in asked(loss) else "demonstrations"


def _options(loss: Callable[..., Tensor], optimum: Callable[..., Tensor] | None, kind: Kind) -> list[dict[str, float]]:
    """Options to try, one after another: unlike 1 and each other; all 1."""
    if optimum is None:
        return [{}]
    hints = get_type_hints(loss, include_extras=True)
    narrowed = get_type_hints(optimum, include_extras=True)
    first: dict[str, float] = {}
    ones: dict[str, float] = {}
    seen: dict[Any, int] = {}
    # Of samples, options that do not move the optimum are the algorithm's own, such as the clip.
    for key in config.options(optimum if kind == "samples" else loss):
        if key in narrowed and get_origin(narrowed[key]) is Literal:
            first[key] = ones[key] = float(get_args(narrowed[key])[0])
        for range_, values in USUAL.items():
            if key not in first and hints[key] == range_:
                first[key] = values[seen.get(range_, 0) % len(values)]
                ones[key] = 1.0 if range_ == Positive else first[key]
                seen[range_] = seen.get(range_, 0) + 1
    return [first, ones]


def _settings(tree: Tree, kind: Kind) -> list[str]:
    """What the sections need for the statement that is checked."""
    if kind != "samples":
        return ["data.responses=1"] if kind == "demonstrations" else []
    settings = [f"{group}.{key}={value}" for (group, key), value in _WANTED.items() if key in (tree.get(group) or {})]
    if "ratings" in _asks(tree):
        return [*settings, "scorer=matches", "scorer.pattern=2$"]
    return [*settings, "scorer=noisy_addition", "scorer.bias=0.5", "scorer.noise=1"]


_WANTED = {
    ("kl", "beta"): str(PENALTY),
    ("advantage", "lam"): "1",  # of a critic that is not right yet only λ = 1 makes an unbiased advantage
    ("advantage", "scale"): "false",  # a division by the spread of the ratings changes what is optimal
    ("target", "floor"): str(FLOOR),
    ("target", "normaliser"): "prompt",
}

# What the world gives once it is there; `reading.read` looks at none of it.
_PLACEHOLDERS = ["model=hf", "model.path=.", "data=file", "data.path=.", "run.dir=.", "engine=torch"]


def _asks(tree: Tree) -> list[str]:
    """The columns that the target is made of."""
    return asked(config.find("align_cli.targets", tree["target"]["name"], "target")) if tree.get("target") else []


# --- data


@dataclass(frozen=True)
class _Data:
    rows: list[dict[str, Any]]
    columns: dict[str, Tensor]
    places: Tensor


def _base(world: World, places: Tensor) -> dict[str, Tensor]:
    """Columns of the responses at these places."""
    lengths = world.lengths.expand(len(places), -1).gather(-1, places)
    return {
        "reference": world.start.gather(-1, places),
        "lengths": lengths,
        "tokens": world.tokens[places],
        "mask": (world.tokens[places] >= 0).double(),
        "mismatch_kl": torch.zeros(len(places), dtype=torch.float64),
    }


def _all(world: World) -> Tensor:
    return torch.arange(len(world.texts)).expand(len(world.prompts), -1)


def _pairs(world: World) -> _Data:
    """Comparisons of one response with each other one: without a cycle, there are scores for any shares of wins."""
    random = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = []
    count = len(world.texts)
    pairs = torch.zeros(len(world.prompts), count, count, dtype=torch.float64)
    for place, prompt in enumerate(world.prompts):
        one, *others = torch.randperm(count, generator=random).tolist()
        for other in others:
            wins = WON[int(torch.randint(len(WON), (1,), generator=random))]
            for chosen, rejected, times in ((one, other, wins[0]), (other, one, wins[1])):
                told = {"prompt": prompt, "chosen": world.texts[chosen], "rejected": world.texts[rejected]}
                rows += [told] * times
                pairs[place, chosen, rejected] = times
    given = {"pairs": pairs / pairs.sum((-2, -1), keepdim=True), "rewards": torch.zeros_like(world.start)}
    return _Data(rows, {**_base(world, _all(world)), **given}, _all(world))


def _groups(world: World) -> _Data:
    """All responses of a prompt in one group, each as often as it has parts: samples of the reference without noise."""
    drawn = [candidates(parts) for parts in world.parts]
    places = torch.stack(drawn)
    rewards = _ratings(world)
    rows = [
        {"prompt": prompt, "completions": [world.texts[k] for k in chosen], "rewards": reward[chosen].tolist()}
        for prompt, chosen, reward in zip(world.prompts, places.tolist(), rewards, strict=True)
    ]
    return _Data(rows, {**_base(world, places), "rewards": rewards.gather(-1, places)}, places)


def _demonstrations(world: World) -> _Data:
    """Single responses, in other shares than the reference's."""
    parts = torch.stack([random_parts(len(world.texts), 100 + place) for place in range(len(world.prompts))])
    rows = [
        {"prompt": prompt, "completion": world.texts[k]}
        for prompt, share in zip(world.prompts, parts, strict=True)
        for k in candidates(share).tolist()
    ]
    shares = (parts / parts.sum(-1, keepdim=True)).double().log()
    return _Data(rows, {**_base(world, _all(world)), "shares": shares}, _all(world))


def _samples(world: World) -> _Data:
    """Prompts alone."""
    rows = [{"prompt": prompt} for prompt in world.prompts]
    return _Data(rows, _base(world, _all(world)), _all(world))


_POSE = {"pairs": _pairs, "groups": _groups, "demonstrations": _demonstrations, "samples": _samples}


def _ratings(world: World) -> Tensor:
    """(P, S) rewards of deviation 1, in hundredths, so that a file holds them exactly."""
    random = torch.Generator().manual_seed(2)
    return torch.randn(world.start.shape, generator=random, dtype=torch.float64).mul(100).round() / 100


def _of_experiment(checked: Experiment, world: World, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns that a scorer and the reward make of samples."""
    if checked.scorer is None or not callable(checked.scorer):
        return {}
    ratings = world.rated(checked.scorer)
    given = {**columns, "ratings": ratings}
    rewards = checked.reward(*(given[name] for name in asked(checked.reward)))
    return {"ratings": ratings, "rewards": rewards}


# --- optima


def _optimum(
    checked: Experiment, optimum: Callable[..., Tensor] | None, columns: Mapping[str, Tensor]
) -> tuple[Tensor | None, tuple[str, str]]:
    """The log-probabilities at which the algorithm rests, what that says, and its source."""
    if checked.target is not None:
        wanted = checked.target(*(columns[name] for name in asked(checked.target)))
        return wanted, ("the policy is the normalised target", "arXiv 2302.08215, theorem 1: D_f is 0 there alone")
    if checked.kl is not None:
        wanted = targets.rlhf(columns["reference"], columns["rewards"], beta=checked.kl.beta)
        told = "the policy is π_ref exp(r/β)/Z, the optimum of E[r] − β KL(π ‖ π_ref)"
        return wanted, (told, "arXiv 1909.08593, eq. 2; arXiv 2305.18290, eq. 4")
    if optimum is None:
        return None, ("", "")
    options = checked.tree["algo"]
    given = {key: options[key] for key in config.options(optimum) if key in options}
    if "divergence" in config.options(optimum):
        given["divergence"] = divergence_of(checked.tree)
    lines = (optimum.__doc__ or "").partition("\n\n")
    told = " ".join(lines[0].split()), " ".join(lines[2].split())
    return optimum(*(columns[name] for name in asked(optimum)), **given), told


def divergence_of(tree: Tree) -> Divergence:
    """The divergence of a configuration that was checked."""
    section = dict(tree["divergence"])
    return config.build(config.find("align_cli.divergences", section.pop("name"), "divergence"), section)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
