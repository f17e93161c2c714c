"""What papers prove of each other, and of themselves where a statement is of one loss alone.

Each entry computes by how much two losses differ that are the same, or a figure with a known sign; the losses are
looked up when it is called.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align_cli.divergences import reverse_kl
from align_cli.errors import first_line
from align_cli.verify.batches import random_columns
from align_cli.verify.checks import EPS, ROUNDINGS, Check, Relation


@dataclass(frozen=True)
class Identity:
    """A statement about an algorithm of ours.

    Attributes:
        check: in a few words.
        measured: gives a number, and the size of what it is the difference of.
        expected, relation: what the number is.
    """

    algorithm: str
    check: str
    statement: str
    source: str
    measured: Callable[[], tuple[float, float]]
    expected: float = 0.0
    relation: Relation = "="


def of(algorithm: str) -> list[Check]:
    """The rows of an algorithm; none for one that is not ours."""
    rows: list[Check] = []
    for known in IDENTITIES:
        if known.algorithm != algorithm:
            continue
        measured, scale, trouble = math.nan, 1.0, ""
        try:
            measured, scale = known.measured()
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            trouble = f"{type(error).__name__}: {first_line(error)}"
        tolerance = ROUNDINGS * EPS * scale if known.relation == "=" else 0.0
        told = (tolerance, known.relation, known.statement, known.source, trouble)
        rows.append(Check(algorithm, known.check, measured, known.expected, *told))
    return rows


def _loss(name: str, **options: Any) -> Callable[..., Tensor]:
    """A loss with its options, as a function of a batch's columns by name."""
    function = vars(importlib.import_module(f"align_cli.losses.{name}"))[name]
    return lambda *columns: function(*columns, **options)


def _apart(one: Tensor, other: Tensor) -> tuple[float, float]:
    return float((one - other).abs().max()), max(1.0, float(other.abs().max()))


def _columns(*names: str, responses: int = 4) -> list[Tensor]:
    batch = random_columns(responses=responses)
    return [batch[name] for name in names]


def _infonca_is_dpo() -> tuple[float, float]:
    policy, reference = _columns("policy", "reference", responses=2)
    one_hot = torch.tensor([[0.0, -math.inf]], dtype=torch.float64).expand(3, 2)
    pair = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64).expand(3, 2, 2)
    return _apart(
        _loss("info_nca", alpha=0.7, beta=0.3)(policy, reference, one_hot),
        _loss("dpo", beta=0.3)(policy, reference, pair),
    )


def _nca_is_pairwise() -> tuple[float, float]:
    policy, reference = _columns("policy", "reference", responses=2)
    one_hot = torch.tensor([[0.0, -math.inf]], dtype=torch.float64).expand(3, 2)
    chosen, rejected = (0.3 * (policy - reference)).unbind(-1)
    pairwise = -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2
    return _apart(_loss("nca", alpha=0.7, beta=0.3)(policy, reference, one_hot), pairwise)


def _exo_is_infonca_reversed() -> tuple[float, float]:
    policy, reference, rewards = _columns("policy", "reference", "rewards")
    alpha, beta = 0.7, 0.3
    # target and policy change places: r/α becomes the log-ratio times β, and the other way round
    swapped = reference + rewards / (alpha * beta), reference, alpha * beta * (policy - reference)
    target = (rewards / alpha).log_softmax(-1)
    entropy = -(target.exp() * target).sum(-1)
    given = _loss("info_nca", alpha=alpha, beta=beta)(policy, reference, rewards) - entropy
    return _apart(_loss("exo", alpha=alpha, beta=beta)(*swapped), given)


def _fdpo_is_dpo() -> tuple[float, float]:
    columns = _columns("policy", "reference", "pairs")
    return _apart(_loss("f_dpo", beta=0.3, divergence=reverse_kl())(*columns), _loss("dpo", beta=0.3)(*columns))


def _cdpo_is_dpo_on_smoothed() -> tuple[float, float]:
    policy, reference, pairs = _columns("policy", "reference", "pairs")
    return _apart(
        _loss("cdpo", beta=0.3, label_smoothing=0.2)(policy, reference, pairs),
        _loss("dpo", beta=0.3)(policy, reference, 0.8 * pairs + 0.2 * pairs.mT),
    )


def _robust_is_unbiased() -> tuple[float, float]:
    policy, reference, pairs = _columns("policy", "reference", "pairs")
    robust = _loss("robust_dpo", beta=0.3, label_smoothing=0.2)
    mean = 0.8 * robust(policy, reference, pairs) + 0.2 * robust(policy, reference, pairs.mT)
    return _apart(mean, _loss("dpo", beta=0.3)(policy, reference, pairs))


def _simpo_is_dpo() -> tuple[float, float]:
    policy, pairs = _columns("policy", "pairs")
    return _apart(
        _loss("simpo", beta=0.3, gamma=0.0)(policy, torch.ones_like(policy), pairs),
        _loss("dpo", beta=0.3)(policy, torch.zeros_like(policy), pairs),
    )


def _orpo_is_likelihood() -> tuple[float, float]:
    policy, lengths, pairs = _columns("policy", "lengths", "pairs")
    return _apart(_loss("orpo", weight=0.0)(policy, lengths, pairs), -(pairs.sum(-1) * policy / lengths).sum(-1))


def _bradley_terry_is_dpo() -> tuple[float, float]:
    scores, pairs, rewards = _columns("scores", "pairs", "rewards")
    return _apart(
        _loss("bradley_terry", centering=0.0, margin=0.0)(scores, pairs, rewards),
        _loss("dpo", beta=1.0)(scores, torch.zeros_like(scores), pairs),
    )


def _ppo_is_reinforce_pp() -> tuple[float, float]:
    names = ("policy_tokens", "values", "behavior_tokens", "old_values", "advantages", "returns")
    columns = _columns(*names)
    ppo = _loss("ppo", clip=0.2, value_clip=0.2, value_weight=0.0)
    return _apart(ppo(*columns), _loss("reinforce_pp", clip=0.2)(columns[0], columns[2], columns[4]))


def _critic_is_regression() -> tuple[float, float]:
    policy, values, advantages, returns = _columns("policy_tokens", "values", "advantages", "returns")
    point = values.clone().requires_grad_()
    ppo = _loss("ppo", clip=0.2, value_clip=0.2, value_weight=0.6)(policy, point, policy, values, advantages, returns)
    (found,) = torch.autograd.grad(ppo.sum(), point)
    return _apart(found, 0.6 * (values - returns))


def _grpo_is_reinforce_pp() -> tuple[float, float]:
    policy, behavior, reference, advantages = _columns(
        "policy_tokens", "behavior_tokens", "reference_tokens", "advantages"
    )
    grpo = _loss("grpo", clip=0.2, beta=0.0)(policy, behavior, reference, advantages)
    return _apart(grpo, _loss("reinforce_pp", clip=0.2)(policy, behavior, advantages))


def _remax_is_reinforce_pp() -> tuple[float, float]:
    columns = _columns("policy_tokens", "behavior_tokens", "advantages")
    return _apart(_loss("remax", clip=0.2)(*columns), _loss("reinforce_pp", clip=0.2)(*columns))


def _rloo_is_remax_of_one_token() -> tuple[float, float]:
    policy, behavior, advantages = _columns("policy_tokens", "behavior_tokens", "advantages")
    policy, behavior, advantages = policy[..., :1], behavior[..., :1], advantages[..., :1]
    rloo = _loss("rloo", clip=0.2)(policy[..., 0], behavior[..., 0], advantages)
    return _apart(rloo, _loss("remax", clip=0.2)(policy, behavior, advantages).mean((-2, -1)))


def _fdpg_is_penalised_rl() -> tuple[float, float]:
    policy, reference, rewards = (column[0] for column in _columns("policy", "reference", "rewards"))
    beta, start = 0.4, reference.log_softmax(-1)
    logits, again = (policy.clone().requires_grad_() for _ in range(2))
    every = logits.log_softmax(-1)
    target = start + rewards / beta
    count = len(rewards)
    drawn = every[:, None], every.detach()[:, None], target[:, None], target.logsumexp(-1).expand(count)
    loss = _loss("fdpg", divergence=reverse_kl(), baseline="none")(*drawn)
    (found,) = torch.autograd.grad((every.detach().exp() * loss).sum(), logits)
    now = again.log_softmax(-1)
    objective = (now.exp() * rewards).sum() - beta * (now.exp() * (now - start)).sum()
    (ascent,) = torch.autograd.grad(objective, again)
    return _apart(found, -ascent / beta)


def _shifted(name: str) -> Callable[[], tuple[float, float]]:
    def measured() -> tuple[float, float]:
        policy, reference, rewards = _columns("policy", "reference", "rewards")
        loss = _loss(name, alpha=0.7, beta=0.3)
        return _apart(loss(policy + 2.0, reference, rewards), loss(policy, reference, rewards))

    return measured


def _nca_pulls_back() -> tuple[float, float]:
    reference, rewards = _columns("reference", "rewards")
    loss = _loss("nca", alpha=0.7, beta=0.3)
    return float((loss(reference - 5.0, reference, rewards) - loss(reference, reference, rewards)).min()), 1.0


def _kto_is_symmetric() -> tuple[float, float]:
    policy, reference, rewards = _columns("policy", "reference", "rewards")
    no_kl = torch.zeros(3, dtype=torch.float64)
    loss = _loss("kto", beta=0.3, threshold=0.0, desirable=0.8, undesirable=0.8)
    # σ(s) + σ(−s) = 1: what is gained by a response that is called good is lost by one that is called bad
    return _apart(
        loss(policy, reference, rewards, no_kl) + loss(policy, reference, -rewards, no_kl),
        torch.full((3,), 0.8, dtype=torch.float64),
    )


IDENTITIES = [
    Identity(
        "info_nca", "is DPO for a hard pair", "two responses and a one-hot target make InfoNCA DPO's loss",
        "arXiv 2402.05369", _infonca_is_dpo,
    ),
    Identity(
        "info_nca", "a shift of scores", "a common shift of all log-ratios changes nothing", "arXiv 2402.05369",
        _shifted("info_nca"),
    ),
    Identity(
        "nca", "is pairwise NCA for a hard pair", "−log σ(s_w) − ½ log σ(−s_w) − ½ log σ(−s_l)", "arXiv 2402.05369",
        _nca_is_pairwise,
    ),
    Identity(
        "nca", "a shift of scores", "all responses 5 nats less likely than the reference cost something",
        "arXiv 2402.05369", _nca_pulls_back, expected=0.1, relation="≥",
    ),
    Identity(
        "exo", "is InfoNCA reversed", "EXO is KL(policy ‖ target), InfoNCA KL(target ‖ policy) and an entropy",
        "arXiv 2402.00856", _exo_is_infonca_reversed,
    ),
    Identity(
        "exo", "a shift of scores", "a common shift of all log-ratios changes nothing", "arXiv 2402.00856",
        _shifted("exo"),
    ),
    Identity("f_dpo", "is DPO for reverse KL", "f′ = log gives DPO's loss", "arXiv 2309.16240", _fdpo_is_dpo),
    Identity(
        "cdpo", "is DPO on smoothed labels", "the loss is linear in the labels", "Mitchell's note of 2023",
        _cdpo_is_dpo_on_smoothed,
    ),
    Identity(
        "robust_dpo", "is DPO, averaged over flips", "without bias: E over flipped labels is DPO on the true ones",
        "arXiv 2403.00409", _robust_is_unbiased,
    ),
    Identity(
        "simpo", "is DPO without lengths", "with γ = 0, one token and no reference it is DPO's loss",
        "arXiv 2405.14734, eq. 6", _simpo_is_dpo,
    ),
    Identity(
        "orpo", "is likelihood without λ", "with λ = 0 it is the preferred response's mean token loss",
        "arXiv 2403.07691", _orpo_is_likelihood,
    ),
    Identity(
        "bradley_terry", "is DPO on scores", "DPO's reward is β log π/π_ref, up to a constant",
        "arXiv 2305.18290, eq. 2 and 7", _bradley_terry_is_dpo,
    ),
    Identity(
        "kto", "good and bad cancel", "with equal weights, calling a response good and bad sums to λ",
        "arXiv 2402.01306: σ(s) + σ(−s) = 1", _kto_is_symmetric,
    ),
    Identity(
        "ppo", "is REINFORCE++ without critic", "with c = 0 PPO's surrogate is that of REINFORCE++",
        "arXiv 1707.06347, eq. 7; arXiv 2501.03262", _ppo_is_reinforce_pp,
    ),
    Identity(
        "ppo", "its critic is a regression", "at the old values the critic's gradient is c (V − R)",
        "arXiv 1707.06347, eq. 9", _critic_is_regression,
    ),
    Identity(
        "grpo", "is REINFORCE++ without KL", "with β = 0 GRPO's surrogate is that of REINFORCE++",
        "arXiv 2402.03300, eq. 3; arXiv 2501.03262", _grpo_is_reinforce_pp,
    ),
    Identity(
        "remax", "is REINFORCE++ on its advantages", "the algorithms differ in their advantages alone",
        "arXiv 2310.10505; arXiv 2501.03262", _remax_is_reinforce_pp,
    ),
    Identity(
        "rloo", "is ReMax for one token", "a response of one token is one action in both", "arXiv 2402.14740, eq. 8",
        _rloo_is_remax_of_one_token,
    ),
    Identity(
        "fdpg", "is RL under a KL penalty", "reverse KL to π_ref exp(r/β): the gradient of −E[r]/β + KL(π ‖ π_ref)",
        "arXiv 2302.08215, section 3", _fdpg_is_penalised_rl,
    ),
]  # fmt: skip
