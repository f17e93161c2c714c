"""What is checked of an algorithm, and what it should be.

Tolerances follow from float64 and from what a check is to tell, never from what was measured:

    value, invariances      `ROUNDINGS` roundings of the largest number that takes part
    slope                   a central difference over h is off by h² f‴/6 and by a rounding over h; h = eps^(1/3)
    rest                    a step of h down a slope gains more than a rounding only if the slope exceeds eps/h
    reached                 a policy of which a hundredth is still the reference, as exact data leave no noise. Samples
                            do: of the 25,600 of a run the last tenth decides, and the mean KL of so many samples of 12
                            responses to their own law is 11/(2 · 2,560) = 0.002 (Wilks); gradients are noisier than
                            frequencies; a policy of which a tenth is still the reference is 0.02 or more away here
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from align_cli import config
from align_cli.columns import POLICY, asked
from align_cli.errors import first_line
from align_cli.preferences import strict_pairs
from align_cli.verify.batches import random_columns
from align_cli.verify.problems import Problem, paper
from align_cli.verify.world import World, kl

EPS = torch.finfo(torch.float64).eps
ROUNDINGS = 256
STEP = EPS ** (1 / 3)
DOWN = 1e-4  # nats, the way that is tried from where an algorithm rests
LEFT = {"exact": 0.01, "samples": 0.1}  # share of the reference that a policy may have kept

Relation = Literal["=", "≥"]


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        algorithm: with its divergence.
        check: in a few words.
        measured, expected, tolerance: numbers; NaN where there is none.
        relation: of measured to expected: equal, or at least, up to the tolerance.
        statement: in a sentence; source: of it.
        trouble: why there is no number; empty where there is one.
    """

    algorithm: str
    check: str
    measured: float
    expected: float
    tolerance: float
    relation: Relation
    statement: str
    source: str
    trouble: str = ""

    @property
    def passed(self) -> bool:
        """Whether it holds; what is not a number does not."""
        if self.relation == "≥":
            return self.measured >= self.expected - self.tolerance
        return abs(self.measured - self.expected) <= self.tolerance


def failed(algorithm: str, check: str, trouble: str) -> Check:
    """A row for what could not be computed."""
    return Check(algorithm, check, math.nan, math.nan, math.nan, "=", check, "", trouble)


def raised(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {first_line(error)}"


def of_loss(problem: Problem) -> list[Check]:
    """All that needs no training."""
    checks: list[Check] = []
    for name, check in CHECKS.items():
        try:
            checks += check(problem)
        except Exception as error:  # a user's loss may raise anything
            checks.append(failed(problem.label, name, raised(error)))
    return checks


def _at(problem: Problem, columns: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch."""
    return problem.loss(*(columns[name] for name in asked(problem.loss)))


def _off(difference: float) -> float:
    """The size of a difference; one that is not a number is the worst."""
    return math.inf if math.isnan(difference) else abs(difference)


def _largest(tensor: Tensor) -> float:
    return max(1.0, float(tensor.detach().abs().max()))


def _row(problem: Problem, check: str, measured: float, scale: float, statement: str, source: str) -> Check:
    """A difference that is 0 up to rounding."""
    return Check(problem.label, check, measured, 0.0, ROUNDINGS * EPS * scale, "=", statement, source)


def value(problem: Problem) -> list[Check]:
    """The closed form beside the loss, with the policy in the reference's place, at K = 2, 3 and 4."""
    stated = vars(problem.module).get("at_reference")
    if stated is None:
        return []
    rows: list[Check] = []
    for responses in (2, 3, 4):
        columns = random_columns(prompts=5, responses=responses)
        columns |= {"policy": columns["reference"], "mismatch_kl": torch.zeros(5, dtype=torch.float64)}
        columns["pairs"] = strict_pairs(columns["rewards"])
        given = {key: problem.keywords[key] for key in config.options(stated)}
        exact = stated(*(columns[name] for name in asked(stated)), **given)
        found = _at(problem, columns)
        if found.shape != exact.shape:
            trouble = f"the loss is {tuple(found.shape)}, at_reference {tuple(exact.shape)}"
            return [failed(problem.label, "value at the reference", trouble)]
        place = int((found - exact).abs().argmax())
        measured, expected = float(found[place]), float(exact[place])
        told = " ".join((stated.__doc__ or "").split()) or "the value that at_reference gives"
        tolerance = ROUNDINGS * EPS * max(1.0, abs(expected))
        source = paper(problem.module)
        rows.append(Check(problem.label, "value at the reference", measured, expected, tolerance, "=", told, source))
    return [max(rows, key=lambda row: _off(row.measured - row.expected) / row.tolerance)]


def invariances(problem: Problem) -> list[Check]:
    """What no loss looks at: the order of a prompt's responses, and other prompts. Nor does it write into its columns.

    The row is of the one that holds worst.
    """
    columns = random_columns(prompts=4, responses=4)
    before = {name: column.clone() for name, column in columns.items()}
    found = _at(problem, columns)
    changed = max(_off(float((columns[name].double() - before[name].double()).abs().max())) for name in columns)
    places = torch.tensor([2, 0, 3, 1])
    moved = {name: column[:, places] if column.dim() > 1 else column for name, column in before.items()}
    moved["pairs"] = before["pairs"][:, places][:, :, places]
    wanted = found if found.dim() == 1 else found[:, places]
    mixed = [
        _at(problem, {name: column[place : place + 1] for name, column in before.items()}) - found[place : place + 1]
        for place in range(4)
    ]
    off = {
        "the order of a prompt's responses does not matter": float((_at(problem, moved) - wanted).abs().max()),
        "prompts do not see each other": max(_off(float(each.abs().max())) for each in mixed),
        "a loss does not write into its columns": changed,
    }
    told, worst = max(off.items(), key=lambda item: _off(item[1]))
    tolerance = ROUNDINGS * EPS * _largest(found)
    return [Check(problem.label, "invariances", worst, 0.0, tolerance, "=", told, "by definition")]


def slope(problem: Problem) -> list[Check]:
    """Autograd's gradient against central differences, of what carries one."""
    if "target" in asked(problem.loss):  # whose value means nothing
        return []
    columns = random_columns(prompts=2, responses=3)
    columns["policy"] = columns["reference"] + 0.2 * (columns["policy"] - columns["reference"])
    worst, largest = 0.0, 1.0
    for name in sorted(POLICY & set(asked(problem.loss))):
        point = columns[name].clone().requires_grad_()
        (exact,) = torch.autograd.grad(_at(problem, {**columns, name: point}).sum(), point)
        for place in range(point.numel()):
            step = torch.zeros(point.numel(), dtype=torch.float64)
            step[place] = STEP
            up, down = (
                _at(problem, {**columns, name: columns[name] + sign * step.view_as(point)}).sum() for sign in (1, -1)
            )
            off = float((up - down) / (2 * STEP) - exact.flatten()[place])
            worst = max(worst, _off(off))
        largest = max(largest, _largest(exact))
    told = "the gradient is the slope of the value"
    # A third derivative and a value of the size of the largest slope, times what slopes on their way to it add up.
    tolerance = ROUNDINGS * STEP**2 * largest
    return [Check(problem.label, "gradient is the slope", worst, 0.0, tolerance, "=", told, "central differences")]


def rest(problem: Problem) -> list[Check]:
    """Ways down from where the algorithm rests, among all distributions of the same mass."""
    steepest, scale = 0.0, 0.0
    for loss, policy in problem.rests:
        posed = problem.with_loss(loss)
        here = posed.value(policy)
        share = policy.softmax(-1)
        random = torch.Generator().manual_seed(3)
        for _ in range(32):
            way = torch.randn(policy.shape, generator=random, dtype=torch.float64)
            way /= way.norm(dim=-1, keepdim=True)
            for sign in (1, -1):
                step = sign * DOWN * way
                kept = 0.0 if problem.own == "scores" else (share * step.exp()).sum(-1, keepdim=True).log()
                gained = float((here - posed.value(policy + step - kept)).max()) / DOWN
                steepest = max(steepest, math.inf if math.isnan(gained) else gained)
        scale = max(scale, _largest(here))
    if not problem.rests:
        return []
    tolerance = ROUNDINGS * EPS * scale / DOWN
    told = f"nothing leads down from: {problem.statement}"
    return [Check(problem.label, "slope at its minimiser", steepest, 0.0, tolerance, "=", told, problem.source)]


def reinforce(problem: Problem) -> list[Check]:
    """The policy's gradient for responses of another policy: REINFORCE's times the ratio, 0 where it is clipped."""
    if "advantages" not in asked(problem.loss):
        return []
    tokenwise = problem.own == "policy_tokens"
    columns = random_columns(prompts=3, responses=4)
    clip = float(problem.options.get("clip", math.inf))
    advantages = columns["advantages"] if tokenwise else columns["advantages"][..., :1]
    behavior = columns["behavior_tokens"] if tokenwise else columns["behavior"]
    checks: list[Check] = []
    ratios = {"within": 1 + min(clip, 1.0) / 2, "beyond": 1 + 2 * clip} if clip < math.inf else {"within": 1.5}
    for name, ratio in ratios.items():
        point = (behavior + math.log(ratio)).requires_grad_()
        given = {**columns, problem.own: point, "reference_tokens": point.detach()}
        (found,) = torch.autograd.grad(_at(problem, given).sum(), point)
        weights = advantages if tokenwise else advantages[..., 0] / advantages.shape[1]
        wanted = -ratio * (weights if name == "within" else weights.clamp(max=0))
        inside = columns["mask"] if tokenwise else torch.ones_like(wanted, dtype=torch.bool)
        off = float((found - wanted)[inside].abs().max())
        if name == "within":
            told = "the gradient is −w A ∇ log π: REINFORCE's, weighed by w = π/q"
        else:
            told = "beyond 1 + ε nothing is gained: the gradient is 0 where A > 0, and −w A ∇ log π elsewhere"
        check = f"policy gradient {name} the clip" if clip < math.inf else "policy gradient"
        checks.append(_row(problem, check, off, _largest(wanted), told, "Williams (1992); arXiv 1707.06347, eq. 7"))
    return checks


def expectation(problem: Problem) -> list[Check]:
    """The gradient of the divergence to the target, from all pairs of responses of a proposal."""
    divergence = problem.keywords.get("divergence")
    if "target" not in asked(problem.loss) or divergence is None:
        return []
    random = torch.Generator().manual_seed(5)
    count = 5
    policy, proposal, target = (torch.randn(count, generator=random, dtype=torch.float64) for _ in range(3))
    proposal, target = proposal.log_softmax(-1), target.log_softmax(-1)
    if divergence.limit < math.inf:  # a response that the target excludes
        target = torch.cat([target[:-1].log_softmax(-1), torch.tensor([-math.inf], dtype=torch.float64)])
    drawn = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    probability = proposal[drawn].sum(-1).exp()
    logits = policy.clone().requires_grad_()
    now = logits.log_softmax(-1)
    told = {
        "policy": now[drawn],
        "behavior": proposal[drawn],
        "target": target[drawn] + 0.7,
        "log_z": torch.full((len(drawn),), 0.7, dtype=torch.float64),
    }
    (found,) = torch.autograd.grad((probability * _at(problem, told)).sum(), logits)
    again = policy.clone().requires_grad_()
    now = again.log_softmax(-1)
    there = target > -math.inf
    distance = (target[there].exp() * divergence.f(now[there] - target[there])).sum()
    if not bool(there.all()):
        distance = distance + divergence.limit * now[~there].exp().sum()
    (wanted,) = torch.autograd.grad(distance, again)
    statement = "in expectation over samples of any proposal the gradient is that of D_f(π ‖ p)"
    off = float((found - wanted).abs().max())
    return [_row(problem, "expected gradient", off, _largest(wanted), statement, "arXiv 2302.08215, theorem 1")]


CHECKS: dict[str, Callable[[Problem], list[Check]]] = {
    "value at the reference": value,
    "slope at its minimiser": rest,
    "policy gradient": reinforce,
    "expected gradient": expectation,
    "gradient is the slope": slope,
    "invariances": invariances,
}


def reached(problem: Problem, world: World, found: Tensor) -> list[Check]:
    """How far a trained policy, or reward model, is from the optimum; exactly, both ways.

    Args:
        found: (P, S) as `training.train` gives it.
    """
    if problem.optimum is None:
        return []
    start = world.start
    if problem.own == "scores":
        found, start = found.log_softmax(-1), torch.zeros_like(start).log_softmax(-1)
    best = problem.optimum
    left = LEFT["samples" if problem.kind == "samples" else "exact"]
    mixed = torch.logaddexp(best + math.log1p(-left), start + math.log(left))
    rows = [("KL from the optimum", kl(best, found), kl(best, mixed))]
    if bool((best > -math.inf).all()):  # else no policy of finite logits is at a finite distance
        rows.append(("KL to the optimum", kl(found, best), kl(mixed, best)))
    return [
        Check(problem.label, f"{name}, trained", far, 0.0, limit, "=", problem.statement, problem.source)
        for name, far, limit in rows
    ]
