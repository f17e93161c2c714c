import math
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from align_cli.columns import GLOSSARY, asked
from align_cli.method import Meter
from align_cli.metrics import (
    Metrics,
    contrast,
    critic,
    displacement,
    implicit_rewards,
    likelihood,
    objective,
    preference,
    ranking,
    update,
)
from align_cli.preferences import strict_pairs


def columns() -> dict[str, torch.Tensor]:
    """Two prompts of three responses. Log-ratios: (1, 2, −1) and (−4, 0, 2); the best are the second and the first."""
    reference = torch.tensor([[-10.0, -12.0, -9.0], [-8.0, -7.0, -6.0]], dtype=torch.float64)
    return {
        "policy": reference + torch.tensor([[1.0, 2.0, -1.0], [-4.0, 0.0, 2.0]], dtype=torch.float64),
        "reference": reference,
        "ratings": torch.tensor([[3.0, 5.0, 1.0], [4.0, 4.0, 2.0]]),
        "lengths": torch.tensor([[5, 4, 3], [6, 2, 2]]),
    }


def means(metrics: Metrics) -> dict[str, float]:
    return {name: (total / count).item() for name, (total, count) in metrics.items()}


def test_every_metric_of_a_batch_worked_out_by_hand() -> None:
    found = means(preference(**columns(), beta=0.5))
    by_hand = {
        "rewards/chosen": 0.5 * (2 - 4) / 2,
        "rewards/rejected": 0.5 * (0 + 1) / 2,
        "rewards/margins": 0.5 * (2 - 5) / 2,
        "rewards/accuracies": (2 / 2 + 0 / 2) / 2,
        "rewards/rank_0": 0.5 * (2 - 4) / 2,
        "rewards/rank_1": 0.5 * (1 + 0) / 2,
        "rewards/rank_2": 0.5 * (-1 + 2) / 2,
        "logps/chosen": (-10 - 12) / 2,
        "logps/rejected": ((-9 - 10) / 2 + (-7 - 4) / 2) / 2,
        "logps_per_token/chosen": (-10 / 4 - 12 / 6) / 2,
        "displacement/chosen": (2 - 4) / 2,
        "displacement/chosen_per_token": (2 / 4 - 4 / 6) / 2,
        "displacement/rejected": (0 + 1) / 2,
        "displacement/fraction_down": 1 / 2,
    }
    assert found.keys() == by_hand.keys()
    for name, figure in by_hand.items():
        assert_close(found[name], float(figure), msg=lambda text, name=name: f"{name}: {text}")


def test_sums_and_counts_of_parts_add_up_to_the_whole() -> None:
    whole = preference(**columns(), beta=0.5)
    parts = [preference(**{name: column[row] for name, column in columns().items()}, beta=0.5) for row in ([0], [1])]
    for name, (total, count) in whole.items():
        assert_close(sum(part[name][0] for part in parts), total)
        assert_close(sum(part[name][1] for part in parts), count)
        assert count == 2


@pytest.mark.parametrize("first", ["cpu", "meta"])
def test_figures_of_the_device_and_of_the_cpu_are_read_together(first: str) -> None:
    other = "meta" if first == "cpu" else "cpu"
    meter = Meter()
    for _ in range(2):  # micro-batches
        meter.add({where: (torch.ones((), device=where), torch.tensor(2)) for where in (first, other)})
    read = meter.together()
    assert read.device.type == "meta" and read.shape == (2, 2)


def test_figures_of_the_cpu_alone_are_their_means() -> None:
    meter = Meter()
    for total, count in ((1.5, 2), (3.0, 1)):
        meter.add({"loss": (torch.tensor(total), torch.tensor(count))})
    assert meter.read() == {"loss": 1.5}


def test_a_pair_has_no_ranks() -> None:
    pairs = {name: column[:, :2] for name, column in columns().items()}
    assert not any("rank" in name for name in preference(**pairs, beta=0.5))


def test_a_single_response_has_no_rejected() -> None:
    single = {name: column[:, :1] for name, column in columns().items()}
    found = means(preference(**single, beta=0.5))
    assert set(found) == {
        "rewards/chosen",
        "logps/chosen",
        "logps_per_token/chosen",
        "displacement/chosen",
        "displacement/chosen_per_token",
        "displacement/fraction_down",
    }
    assert found["displacement/chosen"] == (1 - 4) / 2


def test_a_tie_of_implicit_rewards_is_no_accuracy() -> None:
    batch = columns()
    same = implicit_rewards(batch["reference"], batch["reference"], batch["ratings"], beta=0.5)
    assert means(same)["rewards/accuracies"] == 0
    moved = displacement(batch["reference"], batch["reference"], batch["ratings"], batch["lengths"])
    assert set(means(moved).values()) == {0.0}


def test_metrics_hold_no_gradient() -> None:
    batch = columns()
    batch["policy"].requires_grad_()
    assert not any(total.requires_grad for total, _ in preference(**batch, beta=0.5).values())


def test_metrics_ask_for_columns_of_the_glossary() -> None:
    for metric in (preference, implicit_rewards, likelihood, displacement):
        assert set(asked(metric)) <= set(GLOSSARY)


def test_the_chosen_is_the_first_of_ties_among_many() -> None:
    policy = torch.arange(64.0)[None]
    found = means(likelihood(policy, torch.ones(1, 64), torch.ones(1, 64)))
    assert found["logps/chosen"] == 0


# --- reinforcement learning


def reals(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


NAN = math.nan


def tokens() -> dict[str, torch.Tensor]:
    """Two prompts of two responses: 2, 1, 3 and 2 tokens of three; beyond them is what must not matter."""
    return {
        "policy_tokens": torch.stack([reals([[-1, -2, NAN], [-3, NAN, NAN]]), reals([[-1, -1, -1], [-2, -5, NAN]])]),
        "behavior_tokens": torch.stack([reals([[-1, -1, NAN], [-3, NAN, NAN]]), reals([[-1, -2, -1], [-2, -5, NAN]])]),
        "reference_tokens": torch.stack([reals([[-2, -2, 0], [-3, 0, 0]]), reals([[-1, -1, -1], [-1, -4, 0]])]),
        "values": torch.stack([reals([[1, 2, NAN], [0, NAN, NAN]]), reals([[0, 0, 0], [1, -1, NAN]])]),
        "returns": torch.stack([reals([[3, 2, NAN], [1, NAN, NAN]]), reals([[0, 0, 0], [1, 1, NAN]])]),
        "mask": torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]]).bool(),
        "ratings": torch.tensor([[4.0, 2.0], [0.0, 1.0]]),
        "rewards": torch.tensor([[1.0, -1.0], [0.0, 0.5]]),
        "baselines": torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 1.5]]),
        "scores": reals([[2.0, 0.5], [1.0, 1.0]]),
        "pairs": strict_pairs(reals([[4.0, 2.0], [0.0, 1.0]])),
    }


def measure(metric: Callable[..., Metrics], rows: list[int], **options: float) -> Metrics:
    return metric(*(tokens()[name][rows] for name in asked(metric)), **options)


OF_TOKENS = [(objective, {"beta": 0.5}), (update, {"clip": 0.2}), (critic, {}), (contrast, {}), (ranking, {})]
every_metric_of_samples = pytest.mark.parametrize(
    "metric, options", OF_TOKENS, ids=lambda x: getattr(x, "__name__", "")
)


def test_the_objective_worked_out_by_hand() -> None:
    # KL of the four responses: 2, 0, −1, −2; log-probabilities −2, −3, −4, −7
    found = means(measure(objective, [0, 1], beta=0.5))
    assert found == {
        "objective/kl": -1 / 4,
        "objective/entropy": 16 / 4,
        "objective/scores": 7 / 4,
        "objective/non_score_reward": 0.5 / 4,
        "objective/rlhf_reward": 0.5 / 4 + 0.5 / 4,
    }


def test_an_update_worked_out_by_hand() -> None:
    # eight tokens; one has log-ratio −1, one 1
    found = means(measure(update, [0, 1], clip=0.2))
    assert_close(found["policy/approxkl_avg"], (1 + 1) / 2 / 8)
    assert_close(found["policy/clipfrac_avg"], 2 / 8)
    assert_close(found["val/ratio"], (6 + math.e + 1 / math.e) / 8)
    assert means(measure(update, [0, 1], clip=1.0))["policy/clipfrac_avg"] == 1 / 8


def test_before_an_update_the_ratio_is_1() -> None:
    columns = tokens()
    found = means(update(columns["behavior_tokens"], columns["behavior_tokens"], columns["mask"], clip=0.2))
    assert found == {"policy/approxkl_avg": 0, "policy/clipfrac_avg": 0, "val/ratio": 1}


def test_a_critic_worked_out_by_hand() -> None:
    # errors 2, 0, 1, 0, 0, 0, 0, 2; returns 3, 2, 1, 0, 0, 0, 1, 1
    found = means(measure(critic, [0, 1]))
    assert found == {"loss/value_avg": 9 / 2 / 8, "val/returns": 8 / 8, "val/returns_squared": 16 / 8}


def test_the_explained_variance_of_a_step_follows_from_the_critics_figures() -> None:
    generator = torch.Generator().manual_seed(0)
    returns = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    for values, explained in ((returns, 1.0), (returns.mean().expand(2, 3, 5), 0.0)):
        figures = means(critic(values, returns, torch.ones(2, 3, 5)))
        variance = figures["val/returns_squared"] - figures["val/returns"] ** 2
        assert_close(1 - 2 * figures["loss/value_avg"] / variance, explained, rtol=0, atol=1e-12)


def test_a_contrast_worked_out_by_hand() -> None:
    assert means(measure(contrast, [0, 1])) == {
        "contrastive/raw_score_mean": 7 / 4,
        "contrastive/baseline_mean": (3 + 0.5) / 2,
        "contrastive/score_mean": 0.5 / 4,
        "contrastive/frac_positive": 2 / 4,
    }


def test_a_ranking_worked_out_by_hand() -> None:
    # the first prompt's order is right, the second prompt's scores are equal
    found = means(measure(ranking, [0, 1]))
    assert found == {
        "rewards/accuracies": (1 + 0.5) / 2,
        "rewards/margins": (1.5 + 0) / 2,
        "rewards/chosen": (2 + 1) / 2,
        "rewards/rejected": (0.5 + 1) / 2,
        "rewards/mean": 4.5 / 4,
    }


def test_a_ranking_weighs_preferences_and_counts_prompts_that_have_some() -> None:
    scores = reals([[3.0, 1.0, 2.0], [5.0, 6.0, 7.0]])
    pairs = torch.stack([reals([[0, 0.5, 0.25], [0, 0, 0.25], [0, 0, 0]]), torch.zeros(3, 3).double()])
    found = ranking(scores, pairs)
    assert found["rewards/accuracies"][1] == 1 and found["rewards/mean"][1] == 2
    assert means(found) == {
        "rewards/accuracies": 0.75,
        "rewards/margins": 0.5 * 2 + 0.25 * 1 - 0.25 * 1,
        "rewards/chosen": 0.75 * 3 + 0.25 * 1,
        "rewards/rejected": 0.5 * 1 + 0.5 * 2,
        "rewards/mean": (2 + 6) / 2,
    }


@every_metric_of_samples
def test_figures_of_samples_add_up_and_hold_no_gradient(
    metric: Callable[..., Metrics], options: dict[str, float]
) -> None:
    whole = measure(metric, [0, 1], **options)
    parts = [measure(metric, [row], **options) for row in (0, 1)]
    for name, (total, count) in whole.items():
        assert_close(sum(part[name][0] for part in parts), total)
        assert_close(sum(part[name][1] for part in parts), count)
        assert count.dim() == total.dim() == 0
    columns = [tokens()[name] for name in asked(metric)]
    for column in columns:
        column.requires_grad_(column.is_floating_point())
    assert not any(total.requires_grad for total, _ in metric(*columns, **options).values())
