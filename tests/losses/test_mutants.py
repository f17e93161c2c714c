"""Break each loss, one change of its source at a time, and see its proofs fail.

A mutant is the module made from the changed text. The proofs of `test_<name>.py` that need nothing but the module run
on it; it is killed when one of them fails. A change whose text is no longer in the source, or is there twice, fails.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

import pytest

LOG_RATIO = [
    ("policy - reference", "reference - policy"),
    ("policy - reference", "policy"),
    ("policy - reference", "policy + reference"),
]
PAIRWISE = [
    ("beta * gap(", "gap("),
    ("beta * gap(", "1 / beta * gap("),
    ("beta * gap(", "-beta * gap("),
]
CLASSIFIED = [
    ("-(pairs * logsigmoid(margin))", "(pairs * logsigmoid(margin))"),
    ("logsigmoid(margin)", "logsigmoid(-margin)"),
    ("logsigmoid(margin)", "margin.sigmoid()"),
    ("(pairs * logsigmoid(margin)).sum((-2, -1))", "(pairs * logsigmoid(margin)).mean((-2, -1))"),
    ("(pairs * logsigmoid(margin))", "((pairs > 0) * logsigmoid(margin))"),
    ("(pairs * logsigmoid(margin))", "(pairs.mT * logsigmoid(margin))"),
]
PAIRED_VALUE = [("math.log(2) * pairs", "pairs"), ("math.log(2) * pairs", "math.log(3) * pairs")]
SMOOTHED = [
    ("(1 - label_smoothing) * agree", "agree"),
    ("(1 - label_smoothing) * agree", "(1 - label_smoothing) * disagree"),
    ("label_smoothing * disagree", "disagree"),
    ("label_smoothing * disagree", "label_smoothing * agree"),
    ("logsigmoid(margin), logsigmoid(-margin)", "logsigmoid(-margin), logsigmoid(margin)"),
]
REWARDED = [
    ("beta * (policy", "1 / beta * (policy"),
    ("beta * (policy", "(policy"),
    ("beta * (policy", "-beta * (policy"),
]
RATIO = [
    ("ratio(policy_tokens, behavior_tokens)", "ratio(behavior_tokens, policy_tokens)"),
    ("ratio(policy_tokens, behavior_tokens)", "ratio(policy_tokens, policy_tokens)"),
    ("ratio(policy_tokens, behavior_tokens)", "(policy_tokens - behavior_tokens)"),
    ("ratio(policy_tokens, behavior_tokens)", "ratio(policy_tokens, behavior_tokens).detach()"),
    ("advantages, clip=clip", "-advantages, clip=clip"),
    ("advantages, clip=clip", "advantages, clip=2 * clip"),
    ("advantages, clip=clip", "advantages, clip=1e9"),
    ("clipped(ratio", "-clipped(ratio"),
]

MUTANTS: dict[str, list[tuple[str, str]]] = {
    "sft": [("-policy_tokens", "policy_tokens"), ("-policy_tokens", "-policy_tokens.mean(-1, keepdim=True)")],
    "dpo": LOG_RATIO + PAIRWISE + CLASSIFIED + PAIRED_VALUE,
    "cdpo": [*LOG_RATIO, *PAIRWISE, *SMOOTHED, *PAIRED_VALUE, ("agree + label", "agree - label")],
    "robust_dpo": LOG_RATIO
    + PAIRWISE
    + SMOOTHED
    + PAIRED_VALUE
    + [
        ("agree - label", "agree + label"),
        ("(1 - 2 * label_smoothing)", "(1 - label_smoothing)"),
        ("/ (1 - 2 * label_smoothing)", "* (1 - 2 * label_smoothing)"),
    ],
    "hinge": [
        *LOG_RATIO,
        *PAIRWISE,
        ("(1 - margin).relu()", "(1 + margin).relu()"),
        ("(1 - margin).relu()", "(-margin).relu()"),
        ("(1 - margin).relu()", "(1 - margin)"),
        ("(1 - margin).relu()", "(1 - margin).relu().square()"),
        (".relu()).sum((-2, -1))", ".relu()).mean((-2, -1))"),
        ("return pairs.sum((-2, -1))", "return 2 * pairs.sum((-2, -1))"),
    ],
    "ipo": [
        *LOG_RATIO,
        (" / lengths)", ")"),
        (" / lengths)", " * lengths)"),
        ("margin - 1 / (2 * beta)", "margin + 1 / (2 * beta)"),
        ("margin - 1 / (2 * beta)", "margin - 1 / beta"),
        ("margin - 1 / (2 * beta)", "margin - 2 * beta"),
        (".square()).sum", ".abs()).sum"),
        (".square()).sum", ".square()).mean"),
        ("(pairs * (margin", "(pairs.mT * (margin"),
        ("/ (4 * beta**2)", "/ (2 * beta)"),
    ],
    "f_dpo": [
        *LOG_RATIO,
        *PAIRWISE,
        *CLASSIFIED,
        *PAIRED_VALUE,
        ("divergence.f_prime(", "divergence.f("),
        ("divergence.f_prime(policy - reference)", "(policy - reference)"),
        ("divergence.f_prime(policy - reference)", "divergence.f_prime((policy - reference).exp())"),
        ("gap(divergence.f_prime(policy - reference))", "divergence.f_prime(gap(policy - reference))"),
    ],
    "simpo": [
        *PAIRWISE,
        *CLASSIFIED,
        ("policy / lengths", "policy"),
        ("policy / lengths", "policy * lengths"),
        (") - gamma", ") + gamma"),
        (") - gamma", ")"),
        (") - gamma", ") - beta * gamma"),
        (") - gamma", ") - gamma / beta"),
    ],
    "orpo": [
        ("likelihood = policy / lengths", "likelihood = policy"),
        ("likelihood - _log1mexp", "likelihood + _log1mexp"),
        ("log_odds = likelihood - _log1mexp(likelihood.clamp(max=-CERTAIN))", "log_odds = likelihood"),
        ("likelihood.clamp(max=-CERTAIN)", "likelihood"),
        ("likelihood[..., :, None]", "likelihood[..., None, :]"),
        ("likelihood[..., :, None] + weight", "likelihood[..., :, None] - weight"),
        ("weight * logsigmoid", "logsigmoid"),
        ("logsigmoid(gap(log_odds))", "logsigmoid(-gap(log_odds))"),
        ("return -(pairs", "return (pairs"),
        ("torch.log(-torch.expm1(x))", "torch.log(torch.exp(x))"),
    ],
    "kto": [
        *REWARDED,
        ("(policy - reference -", "(reference - policy -"),
        ("(policy - reference -", "(policy -"),
        ("- mismatch_kl[:, None]", "+ mismatch_kl[:, None]"),
        (" - mismatch_kl[:, None]", ""),
        ("where(rewards > threshold", "where(rewards < threshold"),
        ("where(rewards > threshold", "where(rewards >= threshold"),
        ("where(rewards > threshold", "where(rewards > 0"),
        ("desirable * (-score).sigmoid(), un", "(-score).sigmoid(), un"),
        ("undesirable * score.sigmoid()", "desirable * score.sigmoid()"),
        ("(-score).sigmoid()", "score.sigmoid()"),
        ("* score.sigmoid()", "* (-score).sigmoid()"),
        (".sigmoid()).mean(-1)", ".sigmoid()).sum(-1)"),
        ("undesirable * (1 - good)) / 2", "undesirable * (1 - good))"),
        ("desirable * good + un", "un"),
    ],
    "nca": [
        *LOG_RATIO,
        *REWARDED,
        ("rewards / alpha", "rewards * alpha"),
        ("rewards / alpha", "rewards"),
        ("rewards / alpha", "-rewards / alpha"),
        ("softmax(rewards / alpha, dim=-1)", "softmax(rewards / alpha, dim=0)"),
        ("softmax(rewards / alpha, dim=-1)", "(rewards / alpha).exp()"),
        ("softmax(rewards / alpha, dim=-1)", "softmax(rewards / alpha, dim=-1).sqrt()"),
        ("-(target", "(target"),
        ("(target * logsigmoid(score)).sum(-1)", "(target * logsigmoid(score)).mean(-1)"),
        ("- logsigmoid(-score).mean(-1)", "+ logsigmoid(-score).mean(-1)"),
        ("- logsigmoid(-score).mean(-1)", "- logsigmoid(score).mean(-1)"),
        ("- logsigmoid(-score).mean(-1)", "- logsigmoid(-score).sum(-1)"),
        ("- logsigmoid(-score).mean(-1)", "- (target * logsigmoid(-score)).sum(-1)"),
        ("- logsigmoid(-score).mean(-1)", "- logsigmoid(-score).mean(0).sum()"),
        (" - logsigmoid(-score).mean(-1)", ""),
        (", 2 * math.log(2)", ", math.log(2)"),
    ],
    "info_nca": [
        *LOG_RATIO,
        *REWARDED,
        ("rewards / alpha", "rewards * alpha"),
        ("rewards / alpha", "rewards"),
        ("rewards / alpha", "-rewards / alpha"),
        ("softmax(rewards / alpha, dim=-1)", "softmax(rewards / alpha, dim=0)"),
        ("softmax(rewards / alpha, dim=-1)", "(rewards / alpha).exp()"),
        ("log_softmax(score, dim=-1)", "log_softmax(score, dim=0)"),
        ("log_softmax(score, dim=-1)", "score"),
        ("-(target", "(target"),
        (")).sum(-1)", ")).mean(-1)"),
        ("math.log(responses)", "responses"),
    ],
    "exo": [
        *LOG_RATIO,
        *REWARDED,
        ("log_q = log_softmax(rewards / alpha", "log_q = log_softmax(rewards * alpha"),
        ("log_q = log_softmax(rewards / alpha", "log_q = log_softmax(rewards"),
        ("log_q = log_softmax(rewards / alpha", "log_q = log_softmax(-rewards / alpha"),
        ("log_q = log_softmax(rewards / alpha, dim=-1)", "log_q = log_softmax(rewards / alpha, dim=0)"),
        ("log_q = log_softmax(rewards / alpha, dim=-1)", "log_q = rewards / alpha"),
        ("(policy - reference), dim=-1)", "(policy - reference), dim=0)"),
        ("log_p.exp() * (log_p - log_q)", "log_q.exp() * (log_q - log_p)"),
        ("log_p.exp() * (log_p - log_q)", "log_p.exp() * -log_q"),
        ("log_p.exp() * (log_p - log_q)", "log_p.exp() * (log_q - log_p)"),
        ("log_p.exp() * (log_p", "log_p.exp().detach() * (log_p"),
        ("log_p.exp() * (log_p", "log_p * (log_p"),
        (")).sum(-1)", ")).mean(-1)"),
        ("return -math.log", "return math.log"),
        ("dim=-1).mean(-1)", "dim=-1).sum(-1)"),
    ],
    "fdpg": [
        ("policy.detach()", "policy"),
        ("+ log_z[:, None]", ""),
        ("+ log_z[:, None]", "- log_z[:, None]"),
        ("reward = -torch.where", "reward = torch.where"),
        ("divergence.limit, divergence", "0.0, divergence"),
        ("(now - behavior)", "(behavior - now)"),
        ("weighted = weight * reward", "weighted = reward"),
        ("(policy.shape[-1] - 1)", "policy.shape[-1]"),
        ("(weighted.sum(-1, keepdim=True) - weighted)", "weighted.sum(-1, keepdim=True)"),
        ("-(weight * reward * policy)", "-(reward * policy)"),
        ("-(weight * reward * policy)", "(weight * reward * policy)"),
        (".mean(-1)", ".sum(-1)"),
    ],
    "ppo": [
        *RATIO,
        ("torch.maximum(", "torch.minimum("),
        ("(values - returns).square(), ", "(near - returns).square(), "),
        ("(near - returns).square())", "(values - returns).square())"),
        ("(near - returns).square())", "(near - old_values).square())"),
        ("near = old_values + ", "near = "),
        ("(values - old_values)", "(old_values - values)"),
        (".clamp(-value_clip, value_clip)", ".clamp(-clip, clip)"),
        (".clamp(-value_clip, value_clip)", ".clamp(max=value_clip)"),
        (".clamp(-value_clip, value_clip)", ".clamp(min=-value_clip)"),
        ("+ value_weight * error / 2", "+ value_weight * error"),
        ("+ value_weight * error / 2", "+ error / 2"),
        ("+ value_weight * error / 2", "- value_weight * error / 2"),
    ],
    "grpo": [
        *RATIO,
        ("beta * k3", "k3"),
        ("+ beta * k3", "- beta * k3"),
        ("k3(policy_tokens, reference_tokens)", "k3(reference_tokens, policy_tokens)"),
        ("k3(policy_tokens, reference_tokens)", "k3(policy_tokens, behavior_tokens)"),
        ("k3(policy_tokens, reference_tokens)", "k3(policy_tokens, reference_tokens).detach()"),
        ("k3(policy_tokens, reference_tokens)", "(policy_tokens - reference_tokens)"),
    ],
    "rloo": [
        ("ratio(policy, behavior)", "ratio(behavior, policy)"),
        ("ratio(policy, behavior)", "(policy - behavior)"),
        ("ratio(policy, behavior)", "ratio(policy, behavior).detach()"),
        ("advantages[..., 0]", "-advantages[..., 0]"),
        ("advantages[..., 0]", "advantages.sum(-1)"),
        ("clip=clip", "clip=2 * clip"),
        ("clip=clip", "clip=1e9"),
        (".mean(-1)", ".sum(-1)"),
        ("return clipped", "return -clipped"),
    ],
    "remax": RATIO,
    "reinforce_pp": RATIO,
    "bradley_terry": [
        ("gap(scores)", "-gap(scores)"),
        ("gap(scores) - asked", "gap(scores) + asked"),
        ("gap(scores) - asked", "gap(scores)"),
        ("gap(scores)", "gap(scores.sigmoid())"),
        ("margin * apart", "apart"),
        ("apart = gap(rewards)", "apart = -gap(rewards)"),
        (".masked_fill(~apart.isfinite(), 0.0)", ""),
        ("scores[..., :, None] + scores", "scores[..., :, None] - scores"),
        ("together.square()", "together.abs()"),
        ("together.square()", "together.square() / 4"),
        ("centering * together", "together"),
        ("together.square() - right", "together.square() + right"),
        ("(pairs * (", "(pairs.mT * ("),
        ("(pairs * (", "((pairs > 0) * ("),
        (".sum((-2, -1))", ".mean((-2, -1))"),
    ],
}

Proof = Callable[[ModuleType], None]


def proofs(name: str) -> list[Proof]:
    """The proofs about one loss that need nothing but its module."""
    tests = inspect.getmembers(import_module(f"test_{name}"), inspect.isfunction)
    return [
        test
        for title, test in tests
        if title.startswith("test_") and list(inspect.signature(test).parameters) == ["loss"]
    ]


def mutate(name: str, old: str, new: str) -> ModuleType:
    """The module of one loss, made from its source with `old` replaced by `new`."""
    original = import_module(f"align_cli.losses.{name}")
    source = inspect.getsource(original)
    assert source.count(old) == 1, f"'{old}' is in {name}.py {source.count(old)} times"
    mutant = ModuleType(f"mutant_of_{name}")
    exec(compile(source.replace(old, new), f"<{name}: {old} -> {new}>", "exec"), vars(mutant))
    return mutant


def is_killed(mutant: ModuleType, by: list[Proof]) -> bool:
    """Whether one of the proofs fails on it, by its assertion or because the broken code does not run."""
    for proof in by:
        try:
            proof(mutant)
        except (AssertionError, RuntimeError, TypeError, ValueError):
            return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_no_mutant_survives(name: str) -> None:
    oracles = proofs(name)
    survivors = [change for change in MUTANTS[name] if not is_killed(mutate(name, *change), oracles)]
    assert not survivors


@pytest.mark.parametrize("name", MUTANTS)
def test_the_unbroken_loss_passes_its_proofs(name: str) -> None:
    assert not is_killed(mutate(name, f"def {name}(", f"def {name}("), proofs(name))


def test_every_loss_has_mutants() -> None:
    losses = {module.name for module in iter_modules(import_module("align_cli.losses").__path__)}
    assert losses == set(MUTANTS)
