import math
from types import ModuleType

import torch
from loss_columns import NO_REWARD, as_reals, gradient, mean_over_single_pairs, one_pair
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from align_cli.preferences import gap, strict_pairs
from align_cli.verify.batches import random_columns

MUTANTS = [
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
]

PLAIN = {"centering": 0.0, "margin": 0.0}


def test_scores_of_zero_cost_log_2(loss: ModuleType) -> None:
    for responses in (2, 3, 5):
        batch = random_columns(responses=responses)
        zero = torch.zeros_like(batch["scores"])
        for pairs in (batch["pairs"], strict_pairs(batch["rewards"])):
            value = loss.bradley_terry(zero, pairs, batch["rewards"], centering=0.7, margin=0.0)
            assert_close(value, torch.full((3,), math.log(2), dtype=torch.float64))


def test_a_prompt_without_a_preference_costs_nothing(loss: ModuleType) -> None:
    batch = random_columns()
    equal = torch.zeros_like(batch["rewards"])
    value = loss.bradley_terry(batch["scores"], strict_pairs(equal), equal, centering=0.7, margin=0.3)
    assert torch.equal(value, torch.zeros(3, dtype=torch.float64))


def test_a_pair_costs_minus_log_sigmoid_of_the_difference(loss: ModuleType) -> None:
    batch = random_columns(responses=2)
    value = loss.bradley_terry(batch["scores"], one_pair(3), batch["rewards"], **PLAIN)
    assert_close(value, -logsigmoid(batch["scores"][:, 0] - batch["scores"][:, 1]))


def test_all_pairs_are_the_mean_of_single_pairs(loss: ModuleType) -> None:
    batch = random_columns(responses=4)
    options = {"centering": 0.2, "margin": 0.3}
    value = loss.bradley_terry(batch["scores"], batch["pairs"], batch["rewards"], **options)
    single = mean_over_single_pairs(
        lambda scores, rewards, pairs: loss.bradley_terry(scores, pairs, rewards, **options),
        [batch["scores"], batch["rewards"]],
        batch["pairs"],
    )
    assert_close(value, single)


def test_without_centering_a_shift_of_scores_changes_nothing(loss: ModuleType) -> None:
    batch = random_columns()
    shift = torch.tensor([[3.0], [-5.0], [0.1]], dtype=torch.float64)
    columns = batch["pairs"], batch["rewards"]
    value = loss.bradley_terry(batch["scores"], *columns, centering=0.0, margin=0.3)
    assert_close(loss.bradley_terry(batch["scores"] + shift, *columns, centering=0.0, margin=0.3), value)
    centred, moved = (
        loss.bradley_terry(scores, *columns, centering=0.1, margin=0.3) for scores in (batch["scores"], shift + 50)
    )
    assert (moved > centred).all()


def test_centering_of_a_pair_is_the_squared_sum_of_its_scores(loss: ModuleType) -> None:
    batch = random_columns(responses=2)
    value, plain = (
        loss.bradley_terry(batch["scores"], one_pair(3), batch["rewards"], centering=weight, margin=0.0)
        for weight in (0.2, 0.0)
    )
    assert_close(value - plain, 0.2 * batch["scores"].sum(-1).square())


def test_gradient_vanishes_at_the_scores_that_preferences_came_from(loss: ModuleType) -> None:
    batch = random_columns(responses=5)
    off_diagonal = 1 - torch.eye(5, dtype=torch.float64)
    pairs = gap(batch["rewards"]).sigmoid() * off_diagonal / 20 * 2
    assert_close(pairs.sum((-2, -1)), torch.ones(3, dtype=torch.float64))
    slope = gradient(
        lambda scores: loss.bradley_terry(scores, pairs, batch["rewards"], **PLAIN), batch["rewards"] + 3.0
    )
    assert_close(slope, torch.zeros_like(slope), atol=1e-16, rtol=0)
    elsewhere = gradient(lambda scores: loss.bradley_terry(scores, pairs, batch["rewards"], **PLAIN), batch["scores"])
    assert elsewhere.abs().max() > 1e-2


def test_counts_of_wins_are_explained_best_by_the_strengths_of_bradley_and_terry(loss: ModuleType) -> None:
    """Wins among three; the classical fixed point p_i = W_i / Σ_j n_ij/(p_i + p_j) is where the gradient vanishes."""
    wins = torch.tensor([[0.0, 7, 5], [3, 0, 6], [2, 1, 0]], dtype=torch.float64)
    games = wins + wins.T
    strengths = torch.ones(3, dtype=torch.float64)
    for _ in range(500):
        strengths = wins.sum(-1) / (games / (strengths[:, None] + strengths)).sum(-1)
    pairs, rewards = (wins / wins.sum())[None], as_reals(0, 0, 0)
    slope = gradient(lambda scores: loss.bradley_terry(scores, pairs, rewards, **PLAIN), strengths.log()[None])
    assert_close(slope, torch.zeros_like(slope), atol=1e-14, rtol=0)


def test_a_margin_asks_for_a_lead_in_proportion_to_the_ratings(loss: ModuleType) -> None:
    value = loss.bradley_terry(as_reals(2, 0.5), one_pair(), as_reals(4, 1), centering=0.0, margin=0.25)
    assert_close(value, torch.tensor([math.log(1 + math.exp(-(1.5 - 0.75)))], dtype=torch.float64))


def test_hard_labels_ask_for_no_margin(loss: ModuleType) -> None:
    hard = as_reals(NO_REWARD, 0, NO_REWARD)
    scores = as_reals(0.3, 1, -2)
    plain = loss.bradley_terry(scores, strict_pairs(hard), hard, **PLAIN)
    assert_close(plain, torch.tensor([-(logsigmoid(scores[0, 1] - scores[0, [0, 2]])).mean()], dtype=torch.float64))
    assert torch.equal(loss.bradley_terry(scores, strict_pairs(hard), hard, centering=0.0, margin=2.0), plain)
