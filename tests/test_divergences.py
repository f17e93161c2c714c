import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align_cli.divergences import (
    STEEPEST,
    Divergence,
    alpha,
    forward_chi2,
    forward_kl,
    hellinger,
    jeffreys,
    js,
    reverse_chi2,
    reverse_kl,
    tv,
)

DIVERGENCES = {
    "reverse_kl": reverse_kl(),
    "forward_kl": forward_kl(),
    "js": js(),
    "alpha=0.1": alpha(alpha=0.1),
    "alpha=0.5": alpha(alpha=0.5),
    "alpha=0.9": alpha(alpha=0.9),
    "tv": tv(),
    "hellinger": hellinger(),
    "forward_chi2": forward_chi2(),
    "reverse_chi2": reverse_chi2(),
    "jeffreys": jeffreys(),
}
NAMES = {divergence: name for name, divergence in DIVERGENCES.items()}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
LOG_RATIOS = torch.linspace(-6, 6, 25, dtype=torch.float64)


def slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    point = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(point).sum(), point)
    return found


def distributions() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 9, generator=random, dtype=torch.float64).softmax(-1)
    return first, second


def value(divergence: Divergence, policy: Tensor, fixed: Tensor) -> Tensor:
    """D_f(π ‖ p) by its definition."""
    return (fixed * divergence.f((policy / fixed).log())).sum()


@every_divergence
def test_f_prime_is_the_derivative_of_f_in_the_ratio(divergence: Divergence) -> None:
    # df/dt = (df/d log t)/t
    assert_close(divergence.f_prime(LOG_RATIOS), slope(divergence.f, LOG_RATIOS) * (-LOG_RATIOS).exp())


@every_divergence
def test_f_is_centred(divergence: Divergence) -> None:
    at_one = torch.zeros(1, dtype=torch.float64)
    assert_close(divergence.f(at_one), at_one, atol=1e-15, rtol=0)
    assert_close(divergence.f_prime(at_one), at_one, atol=1e-15, rtol=0)
    assert (divergence.f(LOG_RATIOS) >= 0).all()


@every_divergence
def test_f_is_convex(divergence: Divergence) -> None:
    rises = divergence.f_prime(LOG_RATIOS).diff()
    assert (rises >= 0).all() if NAMES[divergence] == "tv" else (rises > 0).all()


@every_divergence
def test_a_divergence_is_zero_only_between_equals(divergence: Divergence) -> None:
    policy, fixed = distributions()
    assert value(divergence, policy, fixed) > 1e-2
    assert_close(value(divergence, fixed, fixed).item(), 0.0, atol=1e-15, rtol=0)


@every_divergence
def test_f_prime_falls_without_bound_towards_zero_where_it_links(divergence: Divergence) -> None:
    far, farther = divergence.f_prime(torch.tensor([-30.0, -300.0], dtype=torch.float64)).tolist()
    assert divergence.links == (farther < far - 100)
    assert divergence.links or far >= -2 - 1e-12
    assert divergence.links != (NAMES[divergence] in ("tv", "reverse_chi2"))


@every_divergence
def test_the_limit_is_what_f_prime_and_f_over_t_tend_to(divergence: Divergence) -> None:
    far = torch.tensor([40.0, 80.0], dtype=torch.float64)
    if divergence.limit == math.inf:
        assert divergence.f_prime(far).diff() > 39
    else:
        # the slowest family, alpha = 0.9, is e^(−0.1 · 300) off at 300
        assert_close(
            divergence.f_prime(torch.tensor(300.0, dtype=torch.float64)).item(), divergence.limit, rtol=1e-12, atol=0
        )
        over = divergence.f(far[1:]) / far[1:].exp()
        assert_close(over.item(), divergence.limit, rtol=math.exp(-0.1 * 80) * 11, atol=0)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_f_prime_and_its_slope_are_finite_at_a_thousand(divergence: Divergence, dtype: torch.dtype) -> None:
    log_ratios = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0], dtype=dtype)
    found = divergence.f_prime(log_ratios)
    assert found.isfinite().all() and found.dtype == dtype
    slopes = slope(divergence.f_prime, log_ratios)
    assert slopes.isfinite().all()
    if divergence.links:
        assert (slopes[:2] > 0).all(), "an unlikely response must keep a gradient"


def test_the_straight_line_starts_where_it_says_and_without_a_corner() -> None:
    around = torch.tensor([-STEEPEST - 5, -STEEPEST - 1e-6, -STEEPEST + 1e-6], dtype=torch.float64)
    far, before, after = slope(forward_kl().f_prime, around)
    assert_close(far.item(), math.exp(STEEPEST))
    assert_close(before.item(), after.item(), rtol=2e-6, atol=0)
    inside = torch.tensor([-STEEPEST, -10.0, 10.0], dtype=torch.float64)
    assert_close(forward_kl().f_prime(inside), 1 - (-inside).exp())


def test_each_divergence_is_its_textbook_sum() -> None:
    policy, fixed = distributions()
    middle = (policy + fixed) / 2

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first * (first / second).log()).sum()

    assert_close(value(reverse_kl(), policy, fixed), kl(policy, fixed))
    assert_close(value(forward_kl(), policy, fixed), kl(fixed, policy))
    assert_close(value(js(), policy, fixed), kl(policy, middle) + kl(fixed, middle))
    hellinger_distance = 1 - (policy * fixed).sqrt().sum()
    assert_close(value(alpha(alpha=0.5), policy, fixed), 4 * hellinger_distance)
    assert_close(value(hellinger(), policy, fixed), ((policy.sqrt() - fixed.sqrt()) ** 2).sum())
    assert_close(value(tv(), policy, fixed), (policy - fixed).abs().sum() / 2)
    assert_close(value(forward_chi2(), policy, fixed), ((fixed - policy) ** 2 / policy).sum())
    assert_close(value(reverse_chi2(), policy, fixed), ((fixed - policy) ** 2 / fixed).sum())
    assert_close(value(jeffreys(), policy, fixed), kl(policy, fixed) + kl(fixed, policy))


def test_alpha_runs_from_forward_to_reverse_kl() -> None:
    policy, fixed = distributions()
    assert_close(value(alpha(alpha=1e-7), policy, fixed), value(forward_kl(), policy, fixed), rtol=1e-5, atol=0)
    assert_close(value(alpha(alpha=1 - 1e-7), policy, fixed), value(reverse_kl(), policy, fixed), rtol=1e-5, atol=0)


def test_exchanging_the_distributions_exchanges_alpha_and_one_less_alpha() -> None:
    policy, fixed = distributions()
    assert_close(value(alpha(alpha=0.3), policy, fixed), value(alpha(alpha=0.7), fixed, policy))
    assert_close(value(js(), policy, fixed), value(js(), fixed, policy))


def test_another_alpha_convention_differs_in_f_prime_by_a_constant_only() -> None:
    # f-DPO's f′(t) = −t^(−α)/α has α = 1 − alpha
    theirs = -(-0.4 * LOG_RATIOS).exp() / 0.4
    constant = alpha(alpha=0.6).f_prime(LOG_RATIOS) - theirs
    assert_close(constant, torch.full_like(constant, 1 / 0.4))
