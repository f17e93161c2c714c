"""Reward models: what they score, how they learn to, and how a policy's samples are rated by one."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import align, build_model, largest_difference, losses, overrides, read, summary, weights, write_rows
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
)

from align_cli import run, train
from align_cli.data.batches import flatten
from align_cli.data.store import Group
from align_cli.errors import UserError
from align_cli.models import scalar
from align_cli.models.adapters import Adapter, attach
from align_cli.models.causal import Manner, Model, load_model, measure
from align_cli.models.head import Transform
from align_cli.raters import ByModel, Unrated

VOCABULARY = 47  # of the tiny model
CPU = torch.device("cpu")
LORA = Adapter(name="lora", rank=4, scale=8.0, targets="all-linear", bits=None)
WAYS = [Manner(flat, share) for flat, share in ((True, True), (True, False), (False, True))]
# Sums of 32 to 96 products in float64 through two layers: 1e-16 each, scores of order 1.
assert_exactly = partial(assert_close, rtol=0.0, atol=1e-12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", responses=[2, 3], rows=40)


@pytest.fixture(scope="module")
def trained(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned what the rows prefer, with checkpoints on its way."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    assert align("train", *given(model, rows, run_dir)) == 0
    return run_dir


def given(model: Path, rows: Path, run_dir: Path, *more: str) -> list[str]:
    settings = ("algo=bradley_terry", "data.pairs=all", "train.steps=30", "train.lr=1e-2", "checkpoint.every=10")
    return overrides(model, rows, run_dir, *settings, *more)


def section(path: Path) -> Model:
    return Model(name="hf", path=str(path), revision=None, rows="auto", head="auto", architecture=None)


def random_head(network: Any) -> Any:
    """The network in float64, with a head that is not 0."""
    network = network.double()
    head = network.score if hasattr(network, "score") else network.value_head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return network


def groups(sizes: tuple[tuple[int, ...], ...] = ((5, 4, 7), (1, 6, 2)), *, seed: int = 0) -> list[Group]:
    """Prompts of different lengths with responses of these lengths; no token is padding."""
    rng = np.random.default_rng(seed)

    def drawn(length: int) -> np.ndarray:
        return rng.integers(1, VOCABULARY, length).astype(np.int32)

    return [
        Group(place, drawn(9 - place), tuple(map(drawn, lengths)), np.zeros(len(lengths), dtype=np.float32), "here")
        for place, lengths in enumerate(sizes)
    ]


@torch.no_grad()
def alone(network: Any, group: Group) -> list[float]:
    """What transformers' own classifier says of each response, a sequence by itself."""
    sequences = [np.concatenate([group.prompt, each]).astype(np.int64) for each in group.responses]
    return [float(network(input_ids=torch.from_numpy(each)[None]).logits[0, 0]) for each in sequences]


# --- the scores


@pytest.mark.parametrize("way", WAYS, ids=["shared", "packed", "padded"])
def test_scores_are_those_of_transformers_own_classifier_on_each_sequence(way: Manner, model: Path) -> None:
    network = random_head(scalar.load_reward_model(section(model), dtype=torch.float32))
    drawn = groups()
    found = measure(network, way.flatten(drawn), replace(way, scalar="scores"))["scores"]
    assert found.shape == (2, 3)
    assert_exactly(found, torch.tensor([alone(network, group) for group in drawn], dtype=torch.float64))
    assert found.std() > 0.1


def test_scores_are_those_of_transformers_own_classifier_on_padded_sequences(model: Path) -> None:
    network = random_head(scalar.load_reward_model(section(model), dtype=torch.float32))
    (group, *_) = groups()
    sequences = [torch.from_numpy(np.concatenate([group.prompt, each])).long() for each in group.responses]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=network.config.pad_token_id)
    with torch.no_grad():
        own = network(input_ids=ids, attention_mask=(ids != network.config.pad_token_id).long()).logits[:, 0]
    assert_exactly(measure(network, flatten([group]), Manner(True, scalar="scores"))["scores"][0], own)


def test_a_score_depends_on_neither_the_row_nor_the_other_responses(model: Path) -> None:
    network = random_head(scalar.load_reward_model(section(model), dtype=torch.float32))
    way = Manner(True, scalar="scores")
    drawn = groups()
    together = measure(network, flatten(drawn), way)["scores"]
    for place, group in enumerate(drawn):
        assert_exactly(measure(network, flatten([group]), way)["scores"][0], together[place])
        for k, response in enumerate(group.responses):
            single = replace(group, responses=(response,), ratings=group.ratings[:1])
            assert_exactly(measure(network, flatten([single]), way)["scores"][0, 0], together[place, k])


def test_a_response_that_is_there_twice_has_one_score_and_both_gradients(model: Path) -> None:
    network = random_head(scalar.load_reward_model(section(model), dtype=torch.float32))
    (group, *_) = groups(((3, 2),))
    twice = replace(group, responses=(*group.responses, group.responses[0]), ratings=np.zeros(3, dtype=np.float32))
    scores = measure(network, flatten([twice]), Manner(True, scalar="scores"))["scores"][0]
    assert scores[0] == scores[2]
    once = measure(network, flatten([group]), Manner(True, scalar="scores"))["scores"][0]
    both = torch.autograd.grad(scores[0] + scores[2], network.score.weight)[0]
    assert_exactly(both, 2 * torch.autograd.grad(once[0], network.score.weight)[0])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_other_families_are_scored_alike(family: str, model: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    if family == "gpt2":
        built: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **small))
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        built = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=64, **small))
    built.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "model")
    network = random_head(scalar.load_reward_model(section(tmp_path / "model"), dtype=torch.float32))
    drawn = groups()
    found = measure(network, flatten(drawn), Manner(True, scalar="scores"))["scores"]
    assert_exactly(found, torch.tensor([alone(network, group) for group in drawn], dtype=torch.float64))


def test_where_padding_is_the_stop_token_the_stop_token_is_read(model: Path, tmp_path: Path) -> None:
    """Otherwise transformers' classifier would take it for padding and read the token before it."""
    shutil.copytree(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    network = random_head(scalar.load_reward_model(section(tmp_path / "model"), dtype=torch.float32))
    (group, *_) = groups(((4, 3),))
    ended = tuple(np.append(each, tokenizer.eos_token_id).astype(np.int32) for each in group.responses)
    group = replace(group, responses=ended)
    found = measure(network, flatten([group]), Manner(True, scalar="scores"))["scores"][0]
    assert_exactly(found, torch.tensor(alone(network, group), dtype=torch.float64))


def test_a_model_without_a_head_for_scores_gets_one_that_is_0(model: Path) -> None:
    network = scalar.load_reward_model(section(model), dtype=torch.float32)
    assert not any(bool(parameter.any()) for parameter in dict(network.named_children())["score"].parameters())
    assert not measure(network, flatten(groups()), Manner(True, scalar="scores"))["scores"].any()


def test_the_trunk_is_the_language_models(model: Path) -> None:
    network: Any = scalar.load_reward_model(section(model), dtype=torch.float32)
    causal: Any = AutoModelForCausalLM.from_pretrained(model)
    assert largest_difference(network.model.state_dict(), causal.model.state_dict()) == 0


def test_scores_of_a_bf16_model_are_not_rounded_to_bf16(model: Path) -> None:
    network = scalar.load_reward_model(section(model), dtype=torch.bfloat16)
    head: Any = dict(network.named_children())["score"]
    torch.nn.init.normal_(head.weight)
    scores = measure(network, flatten(groups()), Manner(True, scalar="scores"))["scores"]
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


# --- the values


def value_network(model: Path, adapter: Adapter | None = None) -> Any:
    network = load_model(section(model), dtype=torch.float32, bits=None)
    wrapped = network if adapter is None else attach(network, adapter, seed=0)
    scalar.attach_value_head(wrapped)
    random_head(network)
    return wrapped


@pytest.mark.parametrize("adapter", [None, LORA], ids=["none", "lora"])
@pytest.mark.parametrize("way", WAYS, ids=["shared", "packed", "padded"])
@pytest.mark.parametrize("transform", [None, Transform()], ids=["plain", "chunked"])
def test_values_are_of_the_states_that_predict_the_tokens(
    adapter: Adapter | None, way: Manner, transform: Transform | None, model: Path
) -> None:
    network = value_network(model, adapter)
    base = network if adapter is None else network.get_base_model()
    drawn = groups()
    batch = way.flatten(drawn)
    with torch.no_grad():
        found = measure(network, batch, replace(way, transform=transform, logits=4000, scalar="values"))
        plain = measure(network, batch, Manner(flat=False))
    for b, group in enumerate(drawn):
        for k, response in enumerate(group.responses):
            ids = torch.from_numpy(np.concatenate([group.prompt, response])).long()[None]
            with torch.no_grad():
                states = base.get_decoder()(ids)[0][0, len(group.prompt) - 1 : -1]
                values = states @ base.value_head.weight[0] + base.value_head.bias
            assert_exactly(found["values"][b, k, : len(response)], values)
            assert not found["values"][b, k, len(response) :].any()
    assert_close(found["policy_tokens"].double(), plain["policy_tokens"].double(), rtol=0, atol=1e-6)
    assert measure(network, batch, Manner(flat=False)).keys() == {"policy", "policy_tokens"}


def test_a_value_head_starts_at_0_and_trains_with_the_trunk(model: Path) -> None:
    network: Any = load_model(section(model), dtype=torch.float32, bits=None)
    scalar.attach_value_head(network)
    assert not network.value_head.weight.any() and not network.value_head.bias.any()
    random_head(network)
    found = measure(network, flatten(groups()), Manner(True, scalar="values"))
    found["values"].sum().backward()
    assert network.value_head.weight.grad.any() and network.model.embed_tokens.weight.grad.any()
    assert network.lm_head.weight.grad is None


def test_the_self_test_sees_a_head_that_is_0_through(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = scalar.load_reward_model(section(model), dtype=torch.float32)
    way = Manner(True, scalar="scores")
    assert scalar.error_of(network, network, way, CPU) < 1e-5
    policy = load_model(section(model), dtype=torch.float32, bits=None)
    scalar.attach_value_head(policy)
    assert scalar.error_of(policy, policy, replace(way, scalar="values"), CPU) < 1e-5
    right = scalar.causal._flat

    def shifted(batch: Any) -> tuple[Any, Tensor, list[int]]:
        inputs, keep, last = right(batch)
        return inputs, keep + 1, [place - 1 for place in last]

    monkeypatch.setattr(scalar.causal, "_flat", shifted)
    assert scalar.error_of(network, network, way, CPU) > 0.1
    assert scalar.error_of(policy, policy, replace(way, scalar="values"), CPU) > 0.1


# --- learning


def test_the_first_loss_is_log_2_and_preferences_are_learned(trained: Path) -> None:
    told = summary(trained)
    assert losses(trained)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert told["eval/before/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert told["eval/before/rewards/accuracies"] == 0.5
    assert losses(trained)[-1] < 0.6
    assert not any(name.startswith(("reference/", "displacement/")) for name in told)


def test_preferences_are_learned_beyond_the_prompts_that_were_seen(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", responses=[4], rows=150)
    settings = ("data.held_out=50", "train.steps=60", "train.prompts=8", "eval.groups=50")
    assert align("train", *given(model, rows, tmp_path / "run", *settings)) == 0
    told = summary(tmp_path / "run")
    # of some 300 pairs; chance is a half
    assert told["eval/before/rewards/accuracies"] == 0.5
    assert told["eval/after/rewards/accuracies"] > 0.65
    assert told["eval/after/loss"] < told["eval/before/loss"]


def test_a_head_that_does_not_start_at_0_is_a_wrong_start(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = scalar.load_reward_model

    def random(*given: Any, **settings: Any) -> Any:
        network: Any = load(*given, **settings)
        torch.nn.init.normal_(network.score.weight)
        return network

    monkeypatch.setattr("align_cli.assembly.load_reward_model", random)
    assert align("train", *given(model, rows, tmp_path / "run")) == 1
    assert f"it must be {math.log(2):.6f}" in " ".join(capsys.readouterr().err.split())


def test_a_reward_model_is_trained_further_from_where_it_stands(trained: Path, rows: Path, tmp_path: Path) -> None:
    assert align("train", *given(trained / "model", rows, tmp_path / "run", "train.steps=1")) == 0
    assert losses(tmp_path / "run")[0] < 0.6


def test_what_a_run_writes_is_an_ordinary_classifier_that_scores_the_same(trained: Path, rows: Path) -> None:
    folder = trained / "model"
    network = scalar.load_reward_model(section(folder), dtype=torch.float32).double()
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    assert plain.config.num_labels == 1
    drawn = groups()
    found = measure(network, flatten(drawn), Manner(True, scalar="scores"))["scores"]
    assert_exactly(found, torch.tensor([alone(plain, group) for group in drawn], dtype=torch.float64))
    assert found.std() > 0.01


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_align_export_gives_a_classifier_that_scores_as_the_run_ended(
    adapter: str, trained: Path, model: Path, rows: Path, tmp_path: Path
) -> None:
    run_dir = trained
    if adapter == "lora":
        run_dir = tmp_path / "run"
        assert align("train", *given(model, rows, run_dir, "adapter=lora")) == 0
        assert "base_model.model.score.weight" in weights(run_dir)
        assert losses(run_dir)[-1] < 0.6
    assert align("export", str(run_dir), str(tmp_path / "out")) == 0
    exported = scalar.load_reward_model(section(tmp_path / "out"), dtype=torch.float32)
    store = run.prepare(read(given(model, rows, tmp_path / "again")), lambda text: None).held_out
    way = Manner(True, scalar="scores")
    held_out = [store[index] for index in range(len(store)) if len(store[index].responses) == 2]
    with torch.no_grad():
        scores = measure(exported, flatten(held_out), way)["scores"]
    assert scores.std() > 1e-3
    if adapter == "none":
        network = scalar.load_reward_model(section(trained / "model"), dtype=torch.float32)
        assert_close(scores, measure(network, flatten(held_out), way)["scores"].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    adapter: str, trained: Path, model: Path, rows: Path, tmp_path: Path
) -> None:
    whole = trained
    if adapter == "lora":
        whole = tmp_path / "whole"
        assert align("train", *given(model, rows, whole, "adapter=lora")) == 0
    cut = tmp_path / "cut"
    command = given(model, rows, cut, f"adapter={adapter}")
    assert align("train", *command) == 0
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints" / "step_00000030")
    assert align("train", *command) == 0
    assert losses(cut) == losses(whole)
    assert largest_difference(weights(cut), weights(whole)) == 0.0


def test_any_budget_gives_the_same_weights(trained: Path, model: Path, rows: Path, tmp_path: Path) -> None:
    steps = ("train.steps=5", "optimizer.eps=1e-3")  # see test_engines.py
    for name, tokens in (("whole", 8192), ("cut", 40)):
        assert align("train", *given(model, rows, tmp_path / name, *steps, f"engine.micro_tokens={tokens}")) == 0
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) < 1e-6
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


# --- rating


def rater(folder: Path, *, budget: int = 4096) -> ByModel:
    network = scalar.load_reward_model(section(folder), dtype=torch.float32).double()
    return ByModel(network, Manner(True, scalar="scores"), CPU, budget, visits=False)


@pytest.mark.parametrize("budget", [1, 30, 4096])
def test_a_rating_is_the_score_whatever_the_budget(budget: int, trained: Path) -> None:
    drawn = [*groups(), *groups(((2,), (3, 1)), seed=1)]
    found = rater(trained / "model", budget=budget)(drawn)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(trained / "model", dtype=torch.float64)
    for group, rated in zip(drawn, found, strict=True):
        assert isinstance(rated, Group)
        # ratings are float32: 6e-8 of a score of order 1
        assert rated.ratings.tolist() == pytest.approx(alone(plain, group), abs=1e-6)


def test_no_groups_have_no_ratings(trained: Path) -> None:
    assert rater(trained / "model")([]) == []


def test_a_score_that_is_no_number_is_no_rating(trained: Path) -> None:
    rate = rater(trained / "model")
    head: Any = rate.network
    torch.nn.init.constant_(head.score.weight, math.nan)
    for found in rate(groups()):
        assert isinstance(found, Unrated)
        assert found.why == "the reward model gave [nan, nan, nan] for the responses to here."


ONLINE = ("algo=nca", "source=rollout", "source.samples=3", "source.max_new_tokens=6", "reference=frozen")


def test_a_policy_learns_what_a_reward_model_likes(trained: Path, model: Path, rows: Path, tmp_path: Path) -> None:
    settings = [*ONLINE, "algo.beta=0.1", "train.steps=15", "train.prompts=8", "train.lr=1e-2", "eval.samples=8"]
    scored = ["scorer=model", f"scorer.path={trained / 'model'}"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *settings, *scored)) == 0
    told = summary(tmp_path / "run")
    assert told["eval/after/rollout/score"] > told["eval/before/rollout/score"] + 0.1


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_critic_is_in_the_checkpoints_and_not_in_what_a_run_writes(
    adapter: str, trained: Path, model: Path, rows: Path, tmp_path: Path
) -> None:
    settings = ["algo=ppo", "source.samples=2", "source.max_new_tokens=6", "train.steps=2", f"adapter={adapter}"]
    scored = ["scorer=model", f"scorer.path={trained / 'model'}"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *settings, *scored)) == 0
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*/**/engine.safetensors")
    assert any("value_head" in name and bool(tensor.any()) for name, tensor in load_file(saved).items())
    assert not any("value_head" in name for name in weights(tmp_path / "run"))
    if adapter == "none":
        assert weights(tmp_path / "run").keys() == load_file(model / "model.safetensors").keys()


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert align("train", *command) == 2
    return " ".join(capsys.readouterr().err.split())


def other_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages }} other"
    tokenizer.save_pretrained(folder)


def other_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["xyz"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "change, told",
    [
        (None, "it holds LlamaForCausalLM, not a reward model"),
        (other_tokens, "its tokenizer has other tokens than"),
        (other_template, "its chat template is another than"),
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
    ],
)
def test_a_rater_that_does_not_fit_is_refused_before_anything_is_trained(
    change: Any, told: str, trained: Path, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, folder = tmp_path / "policy", tmp_path / "rater"
    shutil.copytree(model, policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(policy)
    shutil.copytree(model if change is None else trained / "model", folder)
    if change is not None:
        change(folder)
    given = overrides(policy, rows, tmp_path / "run", *ONLINE, "scorer=model", f"scorer.path={folder}")
    assert f"scorer.path={folder}: " in (found := refused(capsys, *given)) and told in found
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_in_the_place_of_its_model_is_refused(
    trained: Path, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refused(capsys, *overrides(model, rows, tmp_path, *ONLINE, "scorer=model", f"scorer.path={trained}"))
    assert f"scorer.path={trained}: a run, not a model; use {trained / 'model'}." in found


@pytest.mark.parametrize(
    "more, told",
    [
        (("source=rollout", "scorer=addition", "reference=frozen"), "a reward model learns from responses that are"),
        (("reference=frozen",), "a reward model has no reference"),
        (("model.head=plain",), "a reward model has no output head over tokens"),
        (("adapter=qlora",), "is not a layer for 4 bits"),
    ],
)
def test_what_a_reward_model_has_no_use_for_is_refused(
    more: tuple[str, ...], told: str, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, *given(model, rows, tmp_path / "run", *more))


def test_align_score_has_nothing_to_do_for_a_reward_model(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert align("score", *given(model, rows, tmp_path / "run")) == 2
    assert "algo=bradley_terry has no reference" in " ".join(capsys.readouterr().err.split())


def test_a_classifier_of_several_labels_is_no_reward_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a classifier with 2 labels; a reward model has one"):
        scalar.load_reward_model(section(tmp_path / "model"), dtype=torch.float32)


def test_a_reward_model_whose_head_is_lost_is_refused(trained: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    shutil.copy(trained / "model" / "config.json", tmp_path / "model")
    with pytest.raises(UserError, match=r"lack 1 weights of LlamaForSequenceClassification, score\.weight"):
        scalar.load_reward_model(section(tmp_path / "model"), dtype=torch.float32)


def test_a_family_without_a_classifier_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalar.AutoModelForSequenceClassification, "_model_mapping", {})
    with pytest.raises(UserError, match="no sequence classifier of the model type 'llama'"):
        scalar.load_reward_model(section(model), dtype=torch.float32)


def test_a_family_whose_head_has_another_name_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalar.AutoModelForSequenceClassification, "from_pretrained", LlamaForCausalLM.from_pretrained)
    with pytest.raises(UserError, match="has no linear head named 'score'"):
        scalar.load_reward_model(section(model), dtype=torch.float32)


# --- the plan


def test_the_plan_counts_a_head_for_scores_and_no_logits(capsys: pytest.CaptureFixture[str]) -> None:
    large = ["algo=bradley_terry", "model=qwen2_5_0_5b", "data=ultrafeedback", "data.pairs=all", "adapter=none"]
    assert align("plan", *large, "launch.accelerator=gpu", "launch.memory_gb=80") == 0
    text = capsys.readouterr().out
    assert f"{494_032_768 + 896:,} weights" in text  # its output head is its embedding, and the new one reads 896
    assert "the reward model, with gradient" in text and "reference=" not in text
    assert [line.split("│")[2].strip() for line in text.splitlines() if "logits" in line] == ["0.00"]


def test_the_embedded_world_has_a_setting_that_compares_all_responses() -> None:
    experiment = read(["algo=bradley_terry", "model=tiny", "run.dir=nowhere"])
    assert experiment.data.pairs == "all" and experiment.scalar == "scores" and experiment.alone
    assert train.total_steps(experiment.train, 736) == 2 * 23
