"""Advantages: closed forms, invariances, and gradients whose expectation is a sum over all that can be drawn."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
import yaml
from enumerable import tuples
from torch import Tensor
from torch.testing import assert_close

from align_cli import advantages
from align_cli.advantages import (
    adapted,
    gae,
    greedy,
    group,
    leave_one_out,
    moments,
    returns,
    spread,
    to_go,
    token_rewards,
    whiten,
)
from align_cli.config import check, options
from align_cli.losses.grpo import grpo
from align_cli.losses.ppo import ppo
from align_cli.losses.reinforce_pp import reinforce_pp
from align_cli.losses.remax import remax
from align_cli.losses.rloo import rloo
from align_cli.paths import conf
from align_cli.rewards import contrastive

LENGTHS = torch.tensor([[3, 1, 5], [2, 5, 4]])
MASK = torch.arange(5) < LENGTHS[..., None]
CHOICES = sorted(path.stem for path in (conf() / "advantage").glob("*.yaml"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch() -> dict[str, Tensor]:
    """Two prompts of three responses of up to five tokens; beyond their ends is what must not matter."""
    return {
        "token_rewards": normal(2, 3, 5, seed=1).masked_fill(~MASK, math.nan),
        "old_values": normal(2, 3, 5, seed=2).masked_fill(~MASK, math.inf),
        "rewards": normal(2, 3, seed=3),
        "greedy": normal(2, seed=4),
        "mask": MASK,
    }


def choose(name: str, **columns: Tensor) -> Tensor:
    """The advantages of one choice, with the options of its YAML."""
    written = yaml.safe_load((conf() / "advantage" / f"{name}.yaml").read_text())
    function = vars(advantages)[name]
    wanted = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    return function(*((batch() | columns)[each] for each in wanted), **{key: written[key] for key in options(function)})


every_choice = pytest.mark.parametrize("name", CHOICES)


@every_choice
def test_the_yaml_gives_the_keywords_and_says_whether_to_whiten(name: str) -> None:
    written = yaml.safe_load((conf() / "advantage" / f"{name}.yaml").read_text())
    assert written.pop("name") == name
    assert written.pop("whiten") is (name in ("gae", "to_go"))
    assert check(vars(advantages)[name], written, "advantage") == []


@every_choice
def test_nothing_beyond_a_response_matters_and_nothing_is_there(name: str) -> None:
    found = choose(name)
    assert found.shape == MASK.shape and found.isfinite().all()
    assert not found[~MASK].any()
    other = {each: column.masked_fill(~MASK, -7.0) for each, column in batch().items() if column.dim() == 3}
    assert torch.equal(choose(name, **(other | {"mask": MASK.double()})), found)


@every_choice
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    low = {each: column.to(dtype) for each, column in batch().items() if column.is_floating_point()}
    exact = choose(name, **{each: column.double() for each, column in low.items()})
    found = choose(name, **low)
    assert found.dtype == dtype
    # ten additions in float32, then one rounding
    assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@every_choice
def test_prompts_do_not_see_each_other(name: str) -> None:
    alone = {each: column[1:] for each, column in batch().items()}
    assert_close(choose(name, **alone), choose(name)[1:])


@every_choice
def test_columns_stay_as_they_were(name: str) -> None:
    columns = batch()
    before = {each: column.clone() for each, column in columns.items()}
    choose(name, **columns)
    for each, column in columns.items():
        assert_close(column, before[each], rtol=0, atol=0, equal_nan=True)


# --- generalised advantage estimation


def test_three_tokens_have_the_advantages_worked_out_by_hand() -> None:
    earned = torch.tensor([[[1.0, -2.0, 4.0, 9.0]]], dtype=torch.float64)
    values = torch.tensor([[[0.5, 1.0, 2.0, 9.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1, 1, 1, 0]]])
    third = 4 - 2.0
    second = (-2 + 0.9 * 2 - 1) + 0.9 * 0.5 * third
    first = (1 + 0.9 * 1 - 0.5) + 0.9 * 0.5 * second
    found = gae(earned, values, mask, gamma=0.9, lam=0.5)
    assert_close(found, torch.tensor([[[first, second, third, 0]]], dtype=torch.float64))
    assert_close(returns(found, values, mask), torch.tensor([[[first + 0.5, second + 1, third + 2, 0]]]).double())


def test_lambda_1_is_the_discounted_return_minus_the_value() -> None:
    columns = batch()
    found = gae(columns["token_rewards"], columns["old_values"], MASK, gamma=0.8, lam=1.0)
    for place in MASK.nonzero().tolist():
        prompt, response, token = place
        rest = columns["token_rewards"][prompt, response, token : int(LENGTHS[prompt, response])]
        by_hand = sum(0.8**later * float(earned) for later, earned in enumerate(rest))
        assert_close(float(found[tuple(place)]), by_hand - float(columns["old_values"][tuple(place)]))
    assert_close(
        gae(columns["token_rewards"], columns["old_values"], MASK, gamma=1.0, lam=1.0),
        to_go(columns["token_rewards"], MASK) - columns["old_values"].where(MASK, 0.0),
    )


def test_lambda_0_is_the_error_of_one_step() -> None:
    columns = batch()
    values = columns["old_values"].where(MASK, 0.0)
    following = torch.cat([values[..., 1:], torch.zeros(2, 3, 1)], -1)
    error = columns["token_rewards"] + 0.8 * following - values
    found = gae(columns["token_rewards"], columns["old_values"], MASK, gamma=0.8, lam=0.0)
    assert_close(found, error.where(MASK, 0.0))


def test_a_critic_that_is_right_leaves_no_advantage() -> None:
    earned = batch()["token_rewards"]
    for lam in (0.0, 0.3, 1.0):
        found = gae(earned, to_go(earned, MASK), MASK, gamma=1.0, lam=lam)
        assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-14)


# --- baselines


def test_leave_one_out_is_the_return_against_the_mean_of_the_others() -> None:
    columns = batch()
    found = leave_one_out(columns["token_rewards"], MASK)
    total = columns["token_rewards"].nansum(-1)
    for response in range(3):
        others = [other for other in range(3) if other != response]
        by_hand = total[:, response] - total[:, others].mean(-1)
        assert_close(found[:, response], by_hand[:, None] * MASK[:, response])
    assert_close(found[..., 0], 3 / 2 * (total - total.mean(-1, keepdim=True)))
    assert_close(found[..., 0].sum(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_group_has_mean_0_and_deviation_1() -> None:
    rewards = batch()["rewards"]
    found = group(rewards, MASK, scale=True)
    assert_close(found, found[..., :1] * MASK)
    assert_close(found[..., 0].mean(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)
    deviation = rewards.std(-1)
    assert_close(found[..., 0].std(-1), deviation / (deviation + 1e-6))


def test_dr_grpo_does_not_divide() -> None:
    rewards = batch()["rewards"]
    assert_close(group(rewards, MASK, scale=False)[..., 0], rewards - rewards.mean(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_responses_that_are_all_equally_good_have_advantage_0_exactly(dtype: torch.dtype) -> None:
    for value in (0.1, 1 / 3, 1e6 + 0.1, -7.7):
        for responses in (2, 3, 7, 10):
            rewards, mask = torch.full((1, responses), value, dtype=dtype), torch.ones(1, responses, 1)
            for found in (
                group(rewards, mask, scale=True),
                group(rewards, mask, scale=False),
                leave_one_out(rewards[..., None], mask),
            ):
                assert torch.equal(found, torch.zeros_like(found))


def test_greedy_is_what_is_still_earned_against_the_greedy_response() -> None:
    columns = batch()
    found = greedy(columns["token_rewards"], columns["greedy"], MASK)
    by_hand = torch.zeros(2, 3, 5, dtype=torch.float64)
    for prompt, response, token in MASK.nonzero().tolist():
        rest = columns["token_rewards"][prompt, response, token : int(LENGTHS[prompt, response])].sum()
        by_hand[prompt, response, token] = rest - columns["greedy"][prompt]
    assert_close(found, by_hand)


def test_what_a_rater_adds_to_all_responses_of_a_prompt_changes_nothing() -> None:
    columns, shift = batch(), torch.tensor([[3.0], [-5.0]], dtype=torch.float64)
    baselines = normal(2, 4, seed=5)
    raised = columns["rewards"] + shift

    def earned(rewards: Tensor) -> Tensor:
        zero = torch.zeros(2, 3, 5, dtype=torch.float64)
        return token_rewards(rewards, normal(2, 3, 5, seed=6), zero, MASK, beta=0.2)

    plain, moved = earned(columns["rewards"]), earned(raised)
    assert_close(leave_one_out(moved, MASK), leave_one_out(plain, MASK))
    assert_close(greedy(moved, columns["greedy"] + shift[:, 0], MASK), greedy(plain, columns["greedy"], MASK))
    for scale in (True, False):
        assert_close(group(raised, MASK, scale=scale), group(columns["rewards"], MASK, scale=scale))
    for aggregate in ("mean", "median", "max", "min"):
        against = contrastive(raised, baselines + shift, aggregate=aggregate)
        assert_close(against, contrastive(columns["rewards"], baselines, aggregate=aggregate))


def test_a_contrastive_reward_is_the_plain_one_where_a_group_has_its_own_baseline() -> None:
    columns = batch()
    against = contrastive(columns["rewards"], normal(2, 4, seed=5), aggregate="mean")
    zero = torch.zeros(2, 3, 5, dtype=torch.float64)
    plain, contrasted = (
        token_rewards(rewards, normal(2, 3, 5, seed=6), zero, MASK, beta=0.2)
        for rewards in (columns["rewards"], against)
    )
    assert_close(leave_one_out(contrasted, MASK), leave_one_out(plain, MASK))
    assert_close(group(against, MASK, scale=True), group(columns["rewards"], MASK, scale=True))
    assert (to_go(contrasted, MASK) - to_go(plain, MASK)).abs().max() > 0.1


# --- what tokens earn


def test_tokens_earn_the_reward_minus_the_kl_and_the_last_one_the_reward() -> None:
    behavior, reference = (normal(2, 3, 5, seed=seed).masked_fill(~MASK, math.nan) for seed in (6, 7))
    rewards = batch()["rewards"]
    found = token_rewards(rewards, behavior, reference, MASK, beta=0.3)
    kl = (behavior - reference).nansum(-1)
    assert_close(found.sum(-1), rewards - 0.3 * kl)
    penalty = token_rewards(torch.zeros_like(rewards), behavior, reference, MASK, beta=0.3)
    assert_close(penalty, (-0.3 * (behavior - reference)).where(MASK, 0.0))
    last = torch.nn.functional.one_hot(LENGTHS - 1, 5).bool()
    assert_close((found - penalty)[last], rewards.flatten())
    assert not (found - penalty)[~last].any()


# --- whitening


def test_whitened_advantages_of_a_step_have_mean_0_and_deviation_1_however_it_is_split() -> None:
    raw = (5 + 3 * normal(2, 3, 5, seed=8)).masked_fill(~MASK, math.nan)
    total, squares, count = (sum(parts) for parts in zip(*(moments(raw[[i]], MASK[[i]]) for i in (0, 1)), strict=True))
    assert count == LENGTHS.sum()
    mean, deviation = spread(*map(torch.as_tensor, (total, squares, count)))
    found = whiten(raw, MASK, mean, deviation)
    assert not found[~MASK].any()
    assert_close(float(found[MASK].mean()), 0.0, rtol=0, atol=1e-14)
    assert_close(float(found[MASK].std(correction=0)), 1.0, rtol=0, atol=2e-8)
    assert_close(found[MASK], (raw[MASK] - raw[MASK].mean()) / raw[MASK].std(correction=0), rtol=1e-7, atol=0)


def test_advantages_that_are_all_equal_are_whitened_to_0() -> None:
    for value in (0.0, 0.1, -1234.567):
        raw = torch.full((2, 3, 5), value)
        found = whiten(raw, MASK, *spread(*moments(raw, MASK)))
        assert found.abs().max() < 1e-3


def test_whitened_a_larger_reward_is_a_smaller_penalty() -> None:
    behavior, reference, rewards = normal(2, 3, 5, seed=6), normal(2, 3, 5, seed=7), batch()["rewards"]

    def whitened(scale: float, beta: float) -> Tensor:
        raw = to_go(token_rewards(scale * rewards, behavior, reference, MASK, beta=beta), MASK)
        return whiten(raw, MASK, *spread(*moments(raw, MASK)))

    # 1e-8 beside the deviation
    assert_close(whitened(3.0, 0.3), whitened(1.0, 0.1), rtol=1e-7, atol=1e-7)
    assert (whitened(3.0, 0.3) - whitened(1.0, 0.3)).abs().max() > 0.1


# --- the KL coefficient


def test_beta_rises_where_the_kl_is_too_large_and_falls_where_it_is_too_small() -> None:
    def after(kl: float, samples: int = 100) -> float:
        return adapted(0.15, kl, target=6.0, horizon=10_000, samples=samples)

    assert after(6.0) == 0.15
    assert_close(after(6.6), 0.15 * (1 + 0.1 * 100 / 10_000))
    assert_close(after(5.4), 0.15 * (1 - 0.1 * 100 / 10_000))
    for far in (7.2, 7.3, 1e9):
        assert_close(after(far), 0.15 * (1 + 0.2 * 100 / 10_000))
    for near in (4.8, 4.7, 0.0, -3.0):
        assert_close(after(near), 0.15 * (1 - 0.2 * 100 / 10_000))
    assert_close(after(1e9, samples=10_000), 0.15 * 1.2)


# --- the gradient of the expectation, by adding up all that can be drawn

# Token 0 ends a response: (0), and (1 | 2, any). Seven responses of one or two tokens.
SEQUENCES = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
INSIDE = torch.tensor([[len(sequence) > place for place in range(2)] for sequence in SEQUENCES])
REWARDS = torch.tensor([0.7, -1.2, 0.4, 2.0, -0.3, 1.1, 0.2], dtype=torch.float64)
BETA = 0.4


def tables(seed: int) -> list[Tensor]:
    """Logits of the first token, (3,), and of the second after each first, (3, 3)."""
    return [normal(3, seed=seed).requires_grad_(), normal(3, 3, seed=seed + 100).requires_grad_()]


def token_logs(weights: list[Tensor]) -> Tensor:
    """(7, 2) log-probability of each token, 0 beyond the end."""
    first, second = (table.log_softmax(-1) for table in weights)
    zero = torch.zeros((), dtype=torch.float64)
    rows = [torch.stack([first[s[0]], second[s[0], s[1]] if len(s) > 1 else zero]) for s in SEQUENCES]
    return torch.stack(rows)


def slopes(value: Tensor, of: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, of)])


REFERENCE = token_logs(tables(9)).detach()
CRITIC = normal(3, seed=11)[[0, 1, 1, 1, 2, 2, 2]]  # what it expects of a second token depends on the first
OLD_VALUES = torch.stack([torch.full((7,), 0.6, dtype=torch.float64), CRITIC], -1).where(INSIDE, 0.0)

Draw = Callable[[dict[str, Tensor]], Tensor]


def expected(weights: list[Tensor], drawn_from: list[Tensor], *, responses: int, draw: Draw, beta: float) -> Tensor:
    """The gradient of the loss of all groups of K responses, weighted with their probability."""
    policy, behavior = token_logs(weights), token_logs(drawn_from).detach()
    index = tuples(len(SEQUENCES), responses)
    columns = {
        "policy_tokens": policy[index],
        "policy": policy[index].sum(-1),
        "behavior_tokens": behavior[index],
        "behavior": behavior[index].sum(-1),
        "reference_tokens": REFERENCE[index],
        "old_values": OLD_VALUES[index],
        "rewards": REWARDS[index],
        "mask": INSIDE[index],
    }
    columns["token_rewards"] = token_rewards(
        columns["rewards"], columns["behavior_tokens"], columns["reference_tokens"], columns["mask"], beta=beta
    )
    elements = draw(columns)
    of_group = elements if elements.dim() == 1 else elements.sum(-1).mean(-1)
    return slopes((columns["behavior"].sum(-1).exp() * of_group).sum(), weights)


def truth(weights: list[Tensor], *, beta: float) -> Tensor:
    """The gradient of −E[r − β log π/π_ref] under the policy."""
    policy = token_logs(weights).sum(-1)
    return slopes(-(policy.exp() * (REWARDS - beta * (policy - REFERENCE.sum(-1)))).sum(), weights)


def by_rloo(columns: dict[str, Tensor]) -> Tensor:
    earned = leave_one_out(columns["token_rewards"], columns["mask"])
    return rloo(columns["policy"], columns["behavior"], earned, clip=1e9)


def by_remax(columns: dict[str, Tensor]) -> Tensor:
    most_likely = torch.full((len(columns["mask"]),), float(REWARDS[3]), dtype=torch.float64)
    earned = greedy(columns["token_rewards"], most_likely, columns["mask"])
    return remax(columns["policy_tokens"], columns["behavior_tokens"], earned, clip=0.2)


def by_reinforce_pp(columns: dict[str, Tensor]) -> Tensor:
    earned = to_go(columns["token_rewards"], columns["mask"])
    return reinforce_pp(columns["policy_tokens"], columns["behavior_tokens"], earned, clip=0.2)


def by_ppo(columns: dict[str, Tensor]) -> Tensor:
    old = columns["old_values"]
    found = gae(columns["token_rewards"], old, columns["mask"], gamma=1.0, lam=1.0)
    goal = returns(found, old, columns["mask"])
    options = {"clip": 0.2, "value_clip": 0.2, "value_weight": 0.1}
    return ppo(columns["policy_tokens"], old, columns["behavior_tokens"], old, found, goal, **options)


def by_group(columns: dict[str, Tensor]) -> Tensor:
    found = group(columns["rewards"], columns["mask"], scale=False)
    policy, reference = columns["policy_tokens"], columns["reference_tokens"]
    return grpo(policy, columns["behavior_tokens"], reference, found, clip=0.2, beta=0.0)


@pytest.mark.parametrize("responses, draw", [(2, by_rloo), (3, by_rloo), (1, by_remax), (2, by_remax)])
def test_the_gradient_of_rloo_and_remax_is_that_of_the_objective(responses: int, draw: Draw) -> None:
    weights = tables(1)
    found = expected(weights, weights, responses=responses, draw=draw, beta=BETA)
    assert_close(found, truth(weights, beta=BETA))


@pytest.mark.parametrize("draw", [by_reinforce_pp, by_ppo])
def test_the_gradient_of_reinforce_and_of_ppo_with_any_critic_is_that_of_the_objective(draw: Draw) -> None:
    weights = tables(1)
    found = expected(weights, weights, responses=1, draw=draw, beta=BETA)
    assert_close(found, truth(weights, beta=BETA))


@pytest.mark.parametrize("responses", [2, 3])
def test_the_gradient_of_a_group_is_that_of_the_reward_but_for_the_share_of_the_others(responses: int) -> None:
    weights = tables(1)
    found = expected(weights, weights, responses=responses, draw=by_group, beta=0.0)
    assert_close(found, (responses - 1) / responses * truth(weights, beta=0.0))


def test_the_ratio_of_whole_responses_makes_rloo_exact_on_samples_of_another_policy() -> None:
    weights = tables(1)
    found = expected(weights, tables(2), responses=2, draw=by_rloo, beta=0.0)
    assert_close(found, truth(weights, beta=0.0))
