import torch
from torch.testing import assert_close

from align_cli.preferences import gap, strict_pairs


def test_the_gap_of_i_and_j_is_i_less_j() -> None:
    assert_close(gap(torch.tensor([[5.0, 2.0, 4.0]]))[0], torch.tensor([[0.0, 3, 1], [-3, 0, -2], [-1, 2, 0]]))


def test_all_strict_preferences_weigh_the_same() -> None:
    rewards = torch.tensor([[1.0, 3.0, 2.0], [1.0, 1.0, 0.0]])
    pairs = strict_pairs(rewards)
    assert_close(pairs[0], torch.tensor([[0, 0, 0], [1, 0, 1], [1, 0, 0]]) / 3)
    assert_close(pairs[1], torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0, 0]]) / 2)


def test_a_hard_label_prefers_the_best_to_each_of_the_others() -> None:
    never = float("-inf")
    assert_close(
        strict_pairs(torch.tensor([[never, 0.0, never]]))[0], torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0]]) / 2
    )


def test_equal_rewards_prefer_nothing() -> None:
    for same in (0.0, float("-inf")):
        assert not strict_pairs(torch.full((2, 3), same)).any()
