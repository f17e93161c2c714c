"""`align chat`: through pipes, with one model or two, and whatever a model or a user may write."""

import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console
from scripted_subject import subject_of
from small_runs import align, build_reader

from align_cli import exits, terminal
from align_cli.chat import Options, Speaker
from align_cli.commands import chat

CPU = ("accelerator=cpu", "precision=fp32", "max_new_tokens=8", "seed=0")
OPTIONS = Options(temperature=1.0, max_new_tokens=8, system=None, seed=0, precision="fp32", accelerator="cpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model of the kind of `reader_model`."""
    return build_reader(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def plain(reader_model: Path, tmp_path: Path) -> Path:
    """The same model without a chat template."""
    shutil.copytree(reader_model, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    return tmp_path / "plain"


def speaker(path: Path) -> Speaker:
    return Speaker(subject_of(path), OPTIONS)


def said(one: Speaker, *texts: str) -> list[str]:
    """The answers of a model."""
    return [one.answer(text, lambda new: False).text for text in texts]


@pytest.fixture
def through_pipes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs `align chat` with some bytes as standard input; its exit code, what it answered, and what else it said."""

    def run(given: bytes, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        code = align("chat", *words, *CPU)
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_two_models_answer_each_from_its_own_turns(reader_model: Path, other: Path, through_pipes) -> None:
    code, out, err = through_pipes(
        "Hi\r\n\nÉ? \xff\n".encode("latin-1"), str(reader_model), f"--against={other}", "temperature=1"
    )
    assert code == exits.DONE
    expected = ""
    answers = [said(speaker(path), "Hi", "\ufffd? \ufffd") for path in (reader_model, other)]
    for turn in range(2):
        for path, own in zip((reader_model, other), answers, strict=True):
            expected += f"{path}:\n{terminal.visible(own[turn])}\n"
    assert out == expected
    assert answers[0] != answers[1]
    assert err.count("cut after 8 tokens") == 4


def test_what_was_said_is_remembered_until_a_reset(reader_model: Path) -> None:
    one, fresh = speaker(reader_model), speaker(reader_model)
    first, second = said(one, "a", "b")
    assert [turn["content"] for turn in one.turns] == ["a", first, "b", second]
    fresh.answers = 1
    assert said(fresh, "b") != [second]
    one.begin(None)
    assert said(one, "a") != [first], "asked anew, it draws anew"
    one.begin("Be brief.")
    said(one, "a")
    one.reset()
    assert [turn["content"] for turn in one.turns] == ["Be brief."]


def test_commands_are_obeyed_and_no_text_is_lost(reader_model: Path, through_pipes) -> None:
    code, out, err = through_pipes(
        b"/system Be brief.\na\n/reset\n/exti\n/system\n/exit\nnever said\n", str(reader_model), "temperature=1"
    )
    assert code == exits.DONE
    one = speaker(reader_model)
    one.begin("Be brief.")
    assert out == f"{terminal.visible(said(one, 'a')[0])}\n"
    assert "/exti: " in err and "/system: " in err


def test_the_first_answer_is_the_first_sample(reader_model: Path) -> None:
    subject = subject_of(reader_model)
    [[sample]] = subject.sample([[{"role": "user", "content": "Hi"}]], samples=1, temperature=1.0, max_new_tokens=8)
    assert said(Speaker(subject, OPTIONS), "Hi") == [sample.text]


def test_an_answer_is_shown_token_by_token_and_no_half_characters(reader_model: Path) -> None:
    shown: list[str] = []
    found = speaker(reader_model).answer("Hi", lambda new: shown.append(new) or False)
    assert "".join(shown) == found.text and len(shown) == found.tokens + 1
    assert not any(new.endswith("\ufffd") for new in shown[:-1])


def test_ctrl_c_stops_the_answer_and_not_the_conversation(reader_model: Path) -> None:
    one, shown = speaker(reader_model), list[str]()
    before = signal.getsignal(signal.SIGINT)
    with chat.interruptible() as stopped:

        def show(new: str) -> bool:
            shown.append(new)
            if len(shown) == 3:
                signal.raise_signal(signal.SIGINT)
            return stopped()

        found = one.answer("Hi", show)
    assert signal.getsignal(signal.SIGINT) is before
    assert found.tokens == 3 and found.ended
    assert one.turns[-1]["content"] == found.text
    assert len(said(one, "go on")) == 1


def test_a_model_without_a_template_goes_on_with_each_text(plain: Path, through_pipes) -> None:
    code, out, err = through_pipes(b"one\ntwo\n/system x\n", str(plain), "temperature=0")
    assert code == exits.DONE
    assert "has no chat template" in err and "no system message" in err
    subject = subject_of(plain)
    texts = subject.respond(["one", "two"], samples=1, temperature=0.0, max_new_tokens=8)
    assert out == "".join(f"{terminal.visible(text)}\n" for (text,) in texts)


def test_nothing_that_drives_a_terminal_is_shown_raw() -> None:
    hostile = "\x1b[2J\r\x07\x9b31m\u202eab\u2066\x00\ud800"
    assert terminal.visible(hostile).isascii() and terminal.visible(hostile).isprintable()
    harmless = "a\n\tb\u00a0\u3000é👩\u200d🔬"
    assert terminal.visible(harmless) == harmless


def test_columns_stand_side_by_side_and_show_their_ends(reader_model: Path, other: Path) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=90, height=10, color_system=None)
    both = [speaker(reader_model), speaker(other)]
    with chat.interruptible() as stopped:
        chat.in_columns(both, "Hi", stopped, screen)
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    for path, one in zip((reader_model, other), both, strict=True):
        assert str(path)[:20] in shown
        assert len(one.turns) == 2
    texts = [chat.Text("\n".join(map(str, range(30)))), chat.Text("x " * 100)]
    screen.file = io.StringIO()
    screen.print(chat.columns(["one", "two"], texts, screen, most=4))
    lines = screen.file.getvalue().splitlines()
    assert len(lines) == 5 and lines[-1].split()[0] == "29"
    assert all(len(line) <= 90 for line in lines)


def test_what_cannot_be_answered_is_one_sentence(
    reader_model: Path, plain: Path, tmp_path: Path, through_pipes
) -> None:
    rater = tmp_path / "rater"
    shutil.copytree(reader_model, rater)
    told = json.loads((rater / "config.json").read_text())
    (rater / "config.json").write_text(json.dumps({**told, "architectures": ["LlamaForSequenceClassification"]}))
    model = str(reader_model)
    for words, sentence in (
        ((str(tmp_path / "nothing"),), "there is no such run directory or model's folder"),
        ((str(rater),), "a reward model, which writes no responses"),
        ((model, "--against"), "--against: give one run or model"),
        ((model, "temperature=-1"), "temperature=-1: input should be greater than or equal to 0."),
        ((model, "tokens=2"), "tokens: no such key."),
        ((str(plain), "system=x"), "no system message"),
        (("--against", model), "comes first: align chat"),
    ):
        code, out, err = through_pipes(b"never read\n", *words)
        assert (code, out) == (exits.USER, ""), sentence
        assert sentence in err and len(err.splitlines()) == 1
    code, out, err = through_pipes(b"x" * 5000 + b"\nHi\n", model, "temperature=1")
    assert code == exits.DONE and "/reset begins anew" in err
    assert out == f"{terminal.visible(said(speaker(reader_model), 'Hi')[0])}\n"
