"""Independent implementations agree: TRL's trainer on identical tokens, and the formula of NCA's authors.

TRL's own code runs here from its collator to its loss, on a tiny model with random weights and another one as
reference. Ours takes the same token ids, one plain forward pass without TRL's, `token_logprobs` and a loss.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from align_cli.divergences import alpha, forward_kl, js
from align_cli.logprobs import sum_by, token_logprobs
from align_cli.losses.dpo import dpo
from align_cli.losses.exo import exo
from align_cli.losses.f_dpo import f_dpo
from align_cli.losses.hinge import hinge
from align_cli.losses.ipo import ipo
from align_cli.losses.nca import nca
from align_cli.losses.robust_dpo import robust_dpo
from align_cli.preferences import strict_pairs

VOCABULARY = 30
BETA = 0.3
SMOOTHING = 0.1
HARD = torch.tensor([[0.0, float("-inf")]])
PAIRS = strict_pairs(HARD)

# Three pairs of unequal lengths, as token ids.
ROWS = [
    {"prompt_ids": [3, 4, 5], "chosen_ids": [6, 7, 8, 2], "rejected_ids": [9, 2]},
    {"prompt_ids": [10, 11], "chosen_ids": [12, 2], "rejected_ids": [13, 14, 15, 16, 17, 2]},
    {"prompt_ids": [18, 19, 20, 21], "chosen_ids": [22, 23, 2], "rejected_ids": [24, 25, 2]},
]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

SMOOTHED_LABEL = torch.tensor([[math.log(1 - SMOOTHING), math.log(SMOOTHING)]])

AGREEMENTS: dict[str, tuple[dict[str, Any], Loss]] = {
    "dpo": ({"loss_type": "sigmoid"}, lambda policy, reference, _: dpo(policy, reference, PAIRS, beta=BETA)),
    "hinge": ({"loss_type": "hinge"}, lambda policy, reference, _: hinge(policy, reference, PAIRS, beta=BETA)),
    "ipo": ({"loss_type": "ipo"}, lambda policy, reference, lengths: ipo(policy, reference, lengths, PAIRS, beta=BETA)),
    "robust_dpo": (
        {"loss_type": "robust", "label_smoothing": SMOOTHING},
        lambda policy, reference, _: robust_dpo(policy, reference, PAIRS, beta=BETA, label_smoothing=SMOOTHING),
    ),
    "nca": ({"loss_type": "nca_pair"}, lambda policy, reference, _: nca(policy, reference, HARD, alpha=1, beta=BETA)),
    "exo": (
        {"loss_type": "exo_pair", "label_smoothing": SMOOTHING},
        lambda policy, reference, _: exo(policy, reference, SMOOTHED_LABEL, alpha=1, beta=BETA),
    ),
    "f_dpo forward_kl": (
        {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
        lambda policy, reference, _: f_dpo(policy, reference, PAIRS, beta=BETA, divergence=forward_kl()),
    ),
    "f_dpo js": (
        {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
        lambda policy, reference, _: f_dpo(policy, reference, PAIRS, beta=BETA, divergence=js()),
    ),
    "f_dpo alpha": (
        {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        lambda policy, reference, _: f_dpo(policy, reference, PAIRS, beta=BETA, divergence=alpha(alpha=0.3)),
    ),
}


def tiny_llama(seed: int) -> nn.Module:
    """Two layers of width 16 with weights large enough for log-ratios of a nat."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        attention_dropout=0.0,
    )
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> Any:
    """One word for each id, so that TRL has the tokenizer it asks for."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": VOCABULARY - 1} | {
        f"w{i}": i for i in range(3, VOCABULARY - 1)
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def theirs(folder: Path, options: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Any]:
    """TRL's loss and gradient, and the batch that it was computed on."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    datasets = pytest.importorskip("datasets")
    texts = [
        {
            "prompt": " ".join(f"w{i}" for i in row["prompt_ids"]),
            "chosen": " " + " ".join(f"w{i}" for i in row["chosen_ids"][:-1]),
            "rejected": " " + " ".join(f"w{i}" for i in row["rejected_ids"][:-1]),
        }
        for row in ROWS
    ]
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=len(ROWS),
        disable_dropout=True,
        **options,
    )
    trainer = trl.DPOTrainer(
        model=tiny_llama(seed=0),
        ref_model=tiny_llama(seed=1),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(ROWS))])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in trainer.model.named_parameters()}, batch


def logprobs(model: nn.Module, batch: Any) -> Tensor:
    """(pairs, 2) log-probabilities of chosen and rejected, of a batch of all chosen and then all rejected rows."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    values = token_logprobs(logits[mask], ids[:, 1:][mask])
    rows = mask.nonzero()[:, 0]
    return sum_by(values, rows, len(ids)).view(2, -1).T


# Their warnings are about their own and their dependencies' next versions.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AGREEMENTS)
def test_trl_gives_the_same_loss_and_gradient_on_the_same_tokens(name: str, tmp_path: Path) -> None:
    options, ours = AGREEMENTS[name]
    their_loss, their_gradient, batch = theirs(tmp_path, options)
    expected = [row["prompt_ids"] + row[end] for end in ("chosen_ids", "rejected_ids") for row in ROWS]
    real = [ids[seen.bool()].tolist() for ids, seen in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert real == expected

    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    with torch.no_grad():
        at_reference = logprobs(reference, batch)
    lengths = batch["completion_mask"].sum(-1).view(2, -1).T
    log_probabilities = logprobs(policy, batch)
    assert (log_probabilities - at_reference).abs().max() > 0.5, "too near the reference to tell losses apart"
    loss = ours(log_probabilities, at_reference, lengths).mean()
    loss.backward()

    assert_close(loss.detach(), their_loss, atol=1e-5, rtol=1e-5)
    assert sum(slope.abs().sum() for slope in their_gradient.values()) > 1e-2
    for key, weight in policy.named_parameters():
        assert_close(weight.grad, their_gradient[key], atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_four_responses_agree_with_the_formula_of_ncas_authors() -> None:
    random = torch.Generator().manual_seed(0)
    policy, reference, rewards = torch.randn(3, 5, 4, generator=random)
    # For each prompt: the weighted log-losses of the responses as data, and the mean of all responses as noise, the
    # second averaged over prompts and responses at once, as in their trainer.
    implicit = [[BETA * (policy[b, k] - reference[b, k]) for k in range(4)] for b in range(5)]
    data = noise = torch.zeros(())
    for b in range(5):
        normaliser = sum(torch.exp(rewards[b, j] / 0.4) for j in range(4))
        for k in range(4):
            weight = torch.exp(rewards[b, k] / 0.4) / normaliser
            data = data - weight * logsigmoid(implicit[b][k])
            noise = noise - logsigmoid(-implicit[b][k])
    assert_close(nca(policy, reference, rewards, alpha=0.4, beta=BETA).mean(), data / 5 + noise / 20, atol=1e-6, rtol=0)
