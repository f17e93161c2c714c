from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align_cli.evaluate import exact_match
from align_cli.generation import Drawn, choose, sample, stops
from align_cli.models import tiny

ALPHABET = "ab+=#"
PROMPTS = [[1, 4, 5], [1, 4, 5, 6, 7, 8], [1, 8], [1, 4, 5, 6]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.build(folder, alphabet=ALPHABET, hidden=16, layers=2, heads=2, positions=40, seed=3)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    # Small random weights hardly attend and predict all tokens alike; larger ones make order and context matter.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def responses_of(model: PreTrainedModel, *, seed: int = 0, **changed: object) -> list[list[Drawn]]:
    options = {
        "responses": 3,
        "max_new_tokens": 9,
        "temperature": 1.0,
        "seeds": [(seed, index) for index in range(len(PROMPTS))],
        "batch": 100,
        "pad_id": 0,
        "eos_ids": [2],
    }
    found = dict(sample(model, PROMPTS, **{**options, **changed}))  # type: ignore[arg-type]
    return [found[index] for index in range(len(PROMPTS))]


def drawn(model: PreTrainedModel, *, seed: int = 0, **changed: object) -> list[list[list[int]]]:
    return [[each.tokens for each in group] for group in responses_of(model, seed=seed, **changed)]


def test_greedy_is_the_argmax_of_the_plain_forward_pass(model: PreTrainedModel):
    for prompt, (response,) in zip(PROMPTS, drawn(model, temperature=0, responses=1, max_new_tokens=12), strict=True):
        expected: list[int] = []
        with torch.no_grad():
            while len(expected) < 12 and 2 not in expected:
                expected.append(int(model(torch.tensor([prompt + expected])).logits[0, -1].argmax()))
        assert response == expected


def test_greedy_examples_differ_between_prompts(model: PreTrainedModel):
    assert len({tuple(response) for (response,) in drawn(model, temperature=0, responses=1)}) > 1


def test_samples_do_not_depend_on_the_batch(model: PreTrainedModel):
    many = {"responses": 12, "max_new_tokens": 14}  # some end early, and the others move up
    assert drawn(model, batch=1, **many) == drawn(model, batch=24, **many) == drawn(model, batch=100, **many)


def test_samples_of_equal_prompts_differ(model: PreTrainedModel):
    options = {"max_new_tokens": 9, "temperature": 1.0, "batch": 8, "pad_id": 0, "eos_ids": [2]}
    seeds = [(0, 0), (0, 1)]
    (_, first), (_, second) = sample(model, [[1, 4], [1, 4]], responses=4, seeds=seeds, **options)  # type: ignore[arg-type]
    assert first != second
    assert len({tuple(each.tokens) for each in first}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_response_brings_its_own_log_probability(model: PreTrainedModel, temperature: float):
    for prompt, group in zip(PROMPTS, responses_of(model, temperature=temperature), strict=True):
        for each in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + each.tokens])).logits[0, len(prompt) - 1 : -1]
            logprobs = (logits / temperature).log_softmax(-1)
            expected = logprobs.gather(-1, torch.tensor(each.tokens)[:, None]).squeeze(-1)
            assert each.logprobs == pytest.approx(expected.tolist(), abs=1e-9)
            assert each.ended == (each.tokens[-1] == 2)


def test_a_sample_does_not_depend_on_how_many_there_are(model: PreTrainedModel):
    assert [responses[:2] for responses in drawn(model)] == drawn(model, responses=2)


def test_samples_are_fixed_by_the_seed(model: PreTrainedModel):
    assert drawn(model) == drawn(model) != drawn(model, seed=1)


def test_a_stop_token_ends_a_response_and_belongs_to_it(model: PreTrainedModel):
    responses = [each for group in drawn(model, responses=40, max_new_tokens=14) for each in group]
    ended = [each for each in responses if 2 in each]
    cut = [each for each in responses if 2 not in each]
    assert ended
    assert cut
    assert all(each.index(2) == len(each) - 1 for each in ended)
    assert all(len(each) == 14 for each in cut)


def test_any_of_several_stop_tokens_ends_a_response(model: PreTrainedModel):
    for group in drawn(model, eos_ids=[2, 5], responses=10):
        for each in group:
            assert not {2, 5} & set(each[:-1])


def test_first_tokens_have_the_frequencies_of_the_model(model: PreTrainedModel):
    count = 2000
    groups = drawn(model, responses=count, max_new_tokens=1, temperature=2.0, batch=count)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        with torch.no_grad():
            expected = (model(torch.tensor([prompt])).logits[0, -1] / 2).softmax(-1)
        seen = torch.bincount(torch.tensor([each[0] for each in group]), minlength=len(expected)) / count
        # five standard deviations of a binomial share
        assert (seen - expected).abs().le(5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_choose_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(6, 3)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 1 - 1e-12], dtype=torch.float64)
    tokens, logprobs = choose(logits, uniform, 1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert logprobs.exp().tolist() == pytest.approx([0.2, 0.2, 0.3, 0.3, 0.5, 0.5], abs=1e-7)  # of fp32 logits


def test_choose_never_takes_what_has_no_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert choose(logits, uniform, 1.0)[0].tolist() == [1, 3, 3]


def test_the_model_stays_in_its_mode(model: PreTrainedModel):
    model.train()
    drawn(model, max_new_tokens=2)
    assert model.training
    model.eval()
    drawn(model, max_new_tokens=2)
    assert not model.training


def test_tokens_of_the_tiny_model_are_characters(tokenizer: PreTrainedTokenizerBase):
    assert tokenizer("a+b=#")["input_ids"] == [1, 4, 6, 5, 7, 8]
    assert tokenizer("a?")["input_ids"] == [1, 4, 3]
    assert tokenizer.decode([1, 4, 6, 5, 2], skip_special_tokens=True) == "a+b"
    assert tokenizer.chat_template is None
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_weights_of_the_tiny_model_are_fixed_by_the_seed(folder: Path, tmp_path: Path):
    options = {"alphabet": ALPHABET, "hidden": 16, "layers": 2, "heads": 2, "positions": 40}
    before = torch.random.get_rng_state()
    tiny.build(tmp_path / "same", **options, seed=3)  # type: ignore[arg-type]
    tiny.build(tmp_path / "other", **options, seed=4)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights


def test_exact_match_counts_what_the_program_accepts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    def judge(prompt: str, response: str) -> bool:
        return prompt == "a="

    judged = exact_match(
        model,
        tokenizer,
        ["a=", "b=", "a=b="],
        lambda prompt, response: len(prompt) / 4,
        judge,
        samples=2,
        max_new_tokens=5,
        seed=0,
        examples=2,
    )
    assert judged.figures["exact_match"] == pytest.approx(1 / 3)
    assert judged.figures["exact_match_greedy"] == pytest.approx(1 / 3)
    assert judged.figures["reward"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    for name in ("exact_match", "exact_match_greedy", "reward"):
        low, value, high = (judged.figures[key] for key in (f"{name}_low", name, f"{name}_high"))
        assert low < value < high
    assert [each.prompt for each in judged.examples] == ["a=", "b="]


def test_stop_tokens_are_the_tokenizers_and_the_models(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    assert stops(model, tokenizer) == [2]
