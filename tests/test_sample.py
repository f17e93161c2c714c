"""`align sample`: a file of samples that is whole or not there, whatever happens meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_subject import subject_of
from small_runs import align, overrides, summary

from align_cli import exits, sample
from align_cli.data import toy
from align_cli.data.fields import Prompt
from align_cli.data.records import Record
from align_cli.data.store import Group
from align_cli.data.tokens import Template, Tokenised
from align_cli.models import causal
from align_cli.responses import Response
from align_cli.sample import Asked

HI = [{"role": "user", "content": "Hi"}]
SHORT = ("max_new_tokens=6", "samples=2", "cut=keep", "accelerator=cpu", "precision=fp32")


def write(path: Path, asked: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps({'prompt': each})}\n" for each in asked), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", ["a much longer prompt", HI, "é"])


def test_every_prompt_has_its_samples_in_the_order_of_the_file(reader_model: Path, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.jsonl"
    scored = ("scorer=matches", "scorer.pattern='[a-z]'")
    assert align("sample", str(reader_model), str(asked), str(out), *SHORT, *scored) == exits.DONE
    rows = read(out)
    assert [row["prompt"] for row in rows] == ["a much longer prompt", HI, "é"]
    for row in rows:
        assert len(row["completions"]) == 2
        assert row["rewards"] == [float(any("a" <= one <= "z" for one in text)) for text in row["completions"]]
    plain = tmp_path / "plain.jsonl"
    assert align("sample", str(reader_model), str(asked), str(plain), *SHORT, "limit=2") == exits.DONE
    assert read(plain) == [{key: row[key] for key in ("prompt", "completions")} for row in rows[:2]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_goes_on_and_ends_as_an_undisturbed_one(
    number: signal.Signals, reader_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [f"{n} {number.name}" for n in range(10)])
    out = tmp_path / "out.jsonl"
    words = ("sample", str(reader_model), str(prompts), str(out), *SHORT[1:], "max_new_tokens=40", "batch=2")
    journals = Path(os.environ["ALIGN_CACHE"]) / "responses"

    def kept() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in journals.rglob("*.jsonl")}

    before = kept()
    child = subprocess.Popen([sys.executable, "-m", "align_cli.cli", *words])  # with this process's own cache
    while kept() == before and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(number)
    assert child.wait() == (exits.STOPPED if number == signal.SIGTERM else -number)
    assert not out.exists()
    interrupted = kept()
    assert align(*words) == exits.DONE
    (path,) = (path for path, content in kept().items() if content != before.get(path, b""))
    assert kept()[path].startswith(interrupted[path])
    names = [json.loads(line)["name"] for line in kept()[path].removeprefix(before.get(path, b"")).splitlines()]
    assert len(names) == len(set(names)) == 20  # nothing was drawn twice
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    assert align(*words[:3], str(tmp_path / "undisturbed.jsonl"), *words[4:]) == exits.DONE
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_the_same_command_again_does_nothing_and_another_is_refused(
    reader_model: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    words = ("sample", str(reader_model), str(asked), str(out), *SHORT)
    assert align(*words) == exits.DONE
    stamp, content = out.stat().st_mtime_ns, out.read_bytes()
    monkeypatch.setattr(causal, "load_model", lambda *given, **more: pytest.fail("a model was loaded"))
    assert align(*words) == align(*words, "temperature=1", "batch=3", "limit=3") == exits.DONE
    for other, told in {
        "temperature=0.5": "temperature: 1.0 -> 0.5",
        "limit=1": "prompts:",
        "scorer=compiles": "scorer.name: absent -> 'compiles'",
    }.items():
        capsys.readouterr()
        assert align(*words, other) == exits.USER
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line and "use another file." in line
    assert (out.stat().st_mtime_ns, out.read_bytes()) == (stamp, content)
    out.write_bytes(content + b"{}\n")
    assert align(*words) == exits.USER
    assert "has been changed" in capsys.readouterr().err
    sample.beside(out).unlink()
    assert align(*words) == exits.USER
    assert "nothing beside it" in capsys.readouterr().err
    assert out.read_bytes() == content + b"{}\n"


def test_what_did_not_end_is_left_out_unless_it_is_asked_for(
    reader_model: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sample.drawn

    def first_ends(*given: Any) -> Any:
        found, most = plain(*given)
        return [
            [Response(one.tokens, place == row == 0, 0.0) for place, one in enumerate(own)]
            for row, own in enumerate(found)
        ], most

    monkeypatch.setattr(sample, "drawn", first_ends)
    words = ("sample", str(reader_model), str(asked))
    short = [word for word in SHORT if not word.startswith("cut")]
    assert align(*words, str(tmp_path / "out.jsonl"), *short, "scorer=matches", "scorer.pattern='a'") == exits.DONE
    (row,) = read(tmp_path / "out.jsonl")
    assert row["prompt"] == "a much longer prompt" and len(row["completions"]) == len(row["rewards"]) == 1
    assert "those are left out, and 2 prompts that have no others" in capsys.readouterr().err
    assert align(*words, str(tmp_path / "all.jsonl"), *SHORT) == exits.DONE
    assert [len(row["completions"]) for row in read(tmp_path / "all.jsonl")] == [2, 2, 2]
    monkeypatch.setattr(sample, "ended", lambda found, values: [[] for _ in values])
    assert align(*words, str(tmp_path / "none.jsonl"), *short) == exits.USER
    assert "no response ended within max_new_tokens=6" in capsys.readouterr().err


def test_samples_with_rewards_are_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    problems = [prompt for prompt, _ in zip(toy.problems(0, 2), range(14), strict=False)]
    prompts, out = write(tmp_path / "prompts.jsonl", problems), tmp_path / "out.jsonl"
    scored = ("max_new_tokens=20", "cut=keep", "scorer=noisy_addition", "seed=3")
    assert align("sample", str(tiny_model), str(prompts), str(out), *scored) == exits.DONE
    assert len({rating for row in read(out) for rating in row["rewards"]}) > 14
    run = tmp_path / "run"
    assert (
        align("train", *overrides(tiny_model, out, run, "algo=nca", "train.steps=2", "data.bad_rows=2")) == exits.DONE
    )
    assert summary(run)["steps"] == 2


@pytest.mark.parametrize("name", ["chat", "text"])
@pytest.mark.parametrize("prompt", ["Why?", ({"role": "user", "content": "Why?"},)])
def test_a_sample_reads_back_as_the_tokens_that_were_drawn(
    name: Any, prompt: Prompt, reader_model: Path, tmp_path: Path
) -> None:
    spaced = tmp_path / "spaced"  # its template writes a space before every answer, as Mistral's does
    shutil.copytree(reader_model, spaced)
    file = spaced / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant: {%", "assistant:{%"))
    subject = subject_of(spaced)
    template = Template(subject.tokenizer, template=name, system=None)
    record = Record(prompt, ("Because.", " Two spaces"), (0.0, 0.0), "here")
    [written] = template.tokenise([record])
    assert isinstance(written, Tokenised)
    group = Group(0, written.prompt, (), np.zeros(0, np.float32), "here")
    found = [[Response(each.tolist(), True, 0.0) for each in written.responses]]
    assert sample.texts(subject, Asked([record], [group], template), found) == [list(record.responses)]


def test_what_cannot_be_sampled_is_one_sentence(
    reader_model: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rater = tmp_path / "rater"
    shutil.copytree(reader_model, rater)
    told = json.loads((rater / "config.json").read_text())
    told |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "id2label": {"0": "score"}}
    (rater / "config.json").write_text(json.dumps(told))
    (tmp_path / "bare").mkdir()
    empty, malformed, long = (tmp_path / f"{name}.jsonl" for name in ("empty", "malformed", "long"))
    empty.touch()
    malformed.write_text('{"prompt": "a"}\n{"prompt": 7}\n')
    write(long, ["short", "x" * 5000])
    (tmp_path / "prompts.txt").write_text("Hi")
    (tmp_path / "file").touch()
    model, prompts, out = str(reader_model), str(asked), str(tmp_path / "out.jsonl")
    for words, sentence in (
        ((str(tmp_path / "nothing"), prompts, out), "there is no such run directory or model's folder"),
        ((str(tmp_path / "bare"), prompts, out), "neither a run directory"),
        ((str(rater), prompts, out), "a reward model, which writes no responses"),
        ((model, str(tmp_path / "none.jsonl"), out), "none.jsonl is not there"),
        ((model, str(tmp_path), out), "is a folder; give a file of prompts."),
        ((model, str(tmp_path / "prompts.txt"), out), "a file of another kind"),
        ((model, str(empty), out), "has no rows"),
        ((model, str(malformed), out), "malformed.jsonl:2: prompt is int '7' where a text should be"),
        ((model, str(long), out), "long.jsonl:2: the prompt has"),
        ((model, prompts, str(tmp_path / "bare")), "use a name that ends with .jsonl"),
        ((model, prompts, str(tmp_path / "file" / "out.jsonl")), "cannot be made"),
        ((model, prompts), "come first: align sample"),
        ((model, prompts, out, "samples=0"), "samples=0: input should be greater than or equal to 1."),
        ((model, prompts, out, "sample=2"), "sample: no such key. Did you mean 'samples'?"),
        ((model, prompts, out, "temperature=0"), "use samples=1."),
        ((model, prompts, out, "scorer=matches"), "scorer.pattern has to be given"),
        ((model, prompts, out, "scorer=match"), "Did you mean 'matches'?"),
    ):
        assert align("sample", *words) == exits.USER, sentence
        (line,) = capsys.readouterr().err.splitlines()
        assert sentence in line
    assert not Path(out).exists()
    (tmp_path / "out.jsonl").mkdir()
    assert align("sample", model, prompts, out) == exits.USER
    assert "is a folder; give a file." in capsys.readouterr().err
