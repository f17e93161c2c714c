import torch
from torch.testing import assert_close

from align_cli.logprobs import sum_by, token_logprobs


def test_the_probabilities_of_all_targets_sum_to_one() -> None:
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(token_logprobs(logits.expand(7, 7), torch.arange(7)).exp().sum().item(), 1.0)


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([0, 999, 3, 4, 5])
    value = token_logprobs(logits, targets)
    assert value.dtype == torch.float32
    assert_close(value.double(), token_logprobs(logits.double(), targets), atol=1e-5, rtol=0)


def test_huge_logits_stay_finite() -> None:
    assert_close(token_logprobs(torch.tensor([[1e4, 0.0]]), torch.tensor([1])), torch.tensor([-1e4]))


def test_gradient_is_the_target_less_the_probabilities() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(token_logprobs(logits, torch.tensor([1])).sum(), logits)
    assert_close(slope, torch.tensor([[0.0, 1, 0]], dtype=torch.float64) - logits.softmax(-1))


def test_sums_go_where_their_values_belong() -> None:
    values, index = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0])
    assert_close(sum_by(values, index, 4), torch.tensor([10.0, 0.0, 5.0, 0.0]))


def test_sums_pass_the_gradient_on() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = sum_by(values, torch.tensor([1, 0, 1]), 2)
    (slope,) = torch.autograd.grad(sums @ torch.tensor([3.0, 5.0]), values)
    assert_close(slope, torch.tensor([5.0, 3.0, 5.0]))
