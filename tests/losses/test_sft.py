from types import ModuleType

import torch
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = [("-policy_tokens", "policy_tokens"), ("-policy_tokens", "-policy_tokens.mean(-1, keepdim=True)")]


def test_each_token_costs_its_surprise_and_padding_nothing(loss: ModuleType) -> None:
    tokens = torch.tensor([[[0.5, 0.25, 1.0], [0.125, 1.0, 1.0]]], dtype=torch.float64).log()
    value = loss.sft(tokens) / torch.tensor(2.0).log().double()
    assert_close(value, torch.tensor([[[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_sum_is_the_negative_log_likelihood_of_the_batch(loss: ModuleType) -> None:
    tokens = random_columns()["policy_tokens"]
    likelihood = tokens.double().exp().prod(-1)
    assert_close(loss.sft(tokens).sum(-1), -likelihood.log())
