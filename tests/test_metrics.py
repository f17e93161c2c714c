import torch
from torch.testing import assert_close

from align_cli.columns import GLOSSARY, asked
from align_cli.metrics import Metrics, displacement, implicit_rewards, likelihood, preference


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
