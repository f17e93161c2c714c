"""A model that is asked: what it writes depends on the question alone, is kept, and is never generated twice."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from transformers import AutoModelForCausalLM

from align_cli import generation, paths
from align_cli.data.store import Group
from align_cli.errors import UserError
from align_cli.models import adapters, tiny
from align_cli.models.adapters import Adapter
from align_cli.responses import Response, Responses, Sampling, digest_of
from align_cli.subject import Generate, Subject, find

OPTIONS = Generate(batch=8, seed=0, precision="fp32", accelerator="cpu")
PROMPTS = ["12+30=", "7+8=", "99+1=", "45+45="]


@pytest.fixture
def subject(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The tiny model, with nothing generated yet."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return find(str(tiny_model), OPTIONS)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many responses each call of the sampler was asked for."""
    counts: list[int] = []
    sample: Callable[..., Any] = generation.sample

    def counted(model: Any, prompts: Sequence[Any], *, responses: int, **settings: Any) -> Any:
        counts.append(len(prompts) * responses)
        return sample(model, prompts, responses=responses, **settings)

    monkeypatch.setattr(generation, "sample", counted)
    return counts


def asked(subject: Subject, prompts: Sequence[str] = PROMPTS, samples: int = 3, **settings: Any) -> list[list[str]]:
    return subject.respond(prompts, samples=samples, **{"temperature": 1.0, "max_new_tokens": 12, **settings})


def test_nothing_is_generated_twice(subject: Subject, drawn: list[int]) -> None:
    first = asked(subject)
    assert sum(drawn) == 12
    again = find(subject.name, OPTIONS)  # as another process would find it
    assert asked(again) == first and sum(drawn) == 12
    assert [texts[:3] for texts in asked(again, samples=5)] == first and sum(drawn) == 12 + 8
    assert asked(again, [*PROMPTS, PROMPTS[0], "5+5="], 3)[:5] == [*first, first[0]] and sum(drawn) == 12 + 8 + 3


def test_more_samples_are_those_that_one_call_would_have_drawn(subject: Subject, tmp_path: Path) -> None:
    asked(subject, samples=2)
    more = asked(subject, samples=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(tmp_path / "other"))
        assert asked(find(subject.name, OPTIONS), samples=5) == more


def test_a_response_depends_on_its_own_prompt_and_not_on_the_company(subject: Subject, tmp_path: Path) -> None:
    together = asked(subject)
    for place, prompt in enumerate(PROMPTS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALIGN_CACHE", str(tmp_path / f"cache{place}"))
            assert asked(find(subject.name, replace(OPTIONS, batch=2)), [prompt]) == [together[place]]


@pytest.mark.parametrize("other", [{"temperature": 0.5}, {"max_new_tokens": 5}, {"stop": ["="]}])
def test_other_settings_are_other_responses(subject: Subject, drawn: list[int], other: dict[str, Any]) -> None:
    asked(subject)
    asked(subject, **other)
    assert sum(drawn) == 24
    asked(find(subject.name, replace(OPTIONS, seed=1)))
    assert sum(drawn) == 36


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json"])
def test_other_words_on_where_a_response_ends_are_other_responses(
    file: str, subject: Subject, drawn: list[int], tmp_path: Path
) -> None:
    first = asked(subject)
    copy = Path(shutil.copytree(subject.path, tmp_path / "copy"))
    assert asked(find(str(copy), OPTIONS)) == first and sum(drawn) == 12
    told = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(told | {"a_key": 1}))
    asked(find(str(copy), OPTIONS))
    assert sum(drawn) == 24


def test_adapters_name_the_weights_below_them_from_any_folder_and_their_commit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    network: Any = AutoModelForCausalLM.from_pretrained(f"./{tiny_model.name}")
    adapter = Adapter(name="lora", rank=2, scale=4.0, targets="all-linear", bits=None)
    wrapped = adapters.attach(network, adapter, seed=0, commit="abc")
    wrapped.save_pretrained(str(tmp_path))
    base = find(str(tmp_path), OPTIONS).base
    assert (base.path, base.revision) == (str(tiny_model), "abc")


def test_the_most_likely_response_is_generated_once(subject: Subject, drawn: list[int]) -> None:
    found = asked(subject, temperature=0.0)
    assert sum(drawn) == len(PROMPTS) and all(len(set(texts)) == 1 for texts in found)


def test_a_stop_text_ends_a_response_and_changes_nothing_before_it(subject: Subject) -> None:
    common = {"samples": 4, "temperature": 1.0, "max_new_tokens": 64}
    whole = subject.sample(PROMPTS, **common)
    stopped = subject.sample(PROMPTS, **common, stop=["1", "+"])
    assert any(
        after.tokens < before.tokens
        for a, b in zip(stopped, whole, strict=True)
        for after, before in zip(a, b, strict=True)
    )
    for before, after in zip(chain(*whole), chain(*stopped), strict=True):
        ends = [before.text.index(stop) for stop in ("1", "+") if stop in before.text]
        assert after.text == before.text[: min(ends, default=None)]
        assert after.ended == (bool(ends) or before.ended)


def test_a_line_that_a_kill_has_cut_is_generated_again_and_no_other(subject: Subject, drawn: list[int]) -> None:
    first = asked(subject)
    [journal] = (paths.cache() / "responses").rglob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-10])
    assert asked(find(subject.name, OPTIONS)) == first and sum(drawn) == 13


def test_an_interruption_keeps_what_was_generated(
    subject: Subject, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample: Callable[..., Any] = generation.sample

    def interrupted(*given: Any, **settings: Any) -> Any:
        if len(drawn) == 1:
            raise KeyboardInterrupt
        return sample(*given, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generation, "sample", interrupted)
        asked(subject)
    assert drawn == [6]  # two prompts of a batch of eight sequences
    asked(find(subject.name, OPTIONS))
    assert sum(drawn) == 12


def test_two_evaluations_write_one_store(tmp_path: Path) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=4, stop=[], ends=[], writing="", seed=0, numerics="")
    one, other = (Responses(tmp_path, "weights", sampling) for _ in range(2))
    for number in range(4):
        mine = (one, other)[number % 2]
        mine.add([(digest_of([number]), 0, Response([number], True, -0.5))])
    found = Responses(tmp_path, "weights", sampling)
    assert [found.find(digest_of([n]), 0) for n in range(4)] == [Response([n], True, -0.5) for n in range(4)]


def test_memory_that_is_short_halves_the_batch(
    subject: Subject, drawn: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample: Callable[..., Any] = generation.sample

    def small(model: Any, prompts: Sequence[Any], *, responses: int, **settings: Any) -> Any:
        if len(prompts) * responses > 3:
            raise torch.OutOfMemoryError
        return sample(model, prompts, responses=responses, **settings)

    held: list[BaseException | None] = []  # an error holds the frames of what failed, and these what they allocated
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(sys.exception()))
    monkeypatch.setattr(generation, "sample", small)
    asked(subject)
    assert drawn == [3, 3, 3, 3] and "generate.batch" in capsys.readouterr().err
    assert held and not any(held)


def test_the_sampler_s_log_probability_is_that_of_transformers(subject: Subject) -> None:
    prompts = subject.encode(PROMPTS)
    given = {"temperature": 1.0, "max_new_tokens": 60, "stop": [], "stops": []}
    for prompt, samples in zip(
        prompts, subject.draw([each.tolist() for each in prompts], samples=2, **given), strict=True
    ):
        responses = tuple(np.array(each.tokens, dtype=np.int32) for each in samples)
        told = small_runs.logprobs(Path(subject.path), Group(0, prompt, responses, np.zeros(2, dtype=np.float32), ""))
        assert [each.logprob for each in samples] == pytest.approx(told, abs=1e-3)


def test_what_a_model_cannot_do_is_said_in_a_sentence(subject: Subject) -> None:
    with pytest.raises(UserError, match="chat template"):
        subject.respond([[{"role": "user", "content": "hi"}]], samples=1, temperature=1.0, max_new_tokens=4)
    with pytest.raises(UserError, match="128 positions"):
        asked(subject, max_new_tokens=500)
    with pytest.raises(UserError, match="not a reward model"):
        subject.scores([("1+1=", "2")])


def test_a_model_of_other_tokens_is_refused(subject: Subject, tmp_path: Path) -> None:
    tiny.build(tmp_path / "other", alphabet="abc", hidden=32, layers=1, heads=2, positions=64, seed=0)
    with pytest.raises(UserError, match="tokenizer has other tokens"):
        subject.refuse_other_tokens(find(str(tmp_path / "other"), OPTIONS), "eval.baseline")


def test_a_journal_s_lines_hold_what_follows_from_them(subject: Subject) -> None:
    asked(subject, samples=1)
    [journal] = (paths.cache() / "responses").rglob("*.jsonl")
    assert journal.parent.name == subject.digest
    for line in journal.read_text().splitlines():
        value = json.loads(line)["value"]
        assert value["tokens"] and math.isfinite(value["logprob"]) and value["logprob"] < 0
