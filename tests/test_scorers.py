"""Scorers that ask a library: style by pycodestyle, named entities by spaCy."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_runs import align, overrides

from align_cli import config, raters, scorers
from align_cli.errors import UserError

CLEAN = "def add(a, b):\n    return a + b\n"
STYLE: dict[str, Any] = {"max_line_length": 79, "ignore": ["W503"]}
LISTED = """
LOADED = {}

def listed(prompt: str, response: str, *, words: str) -> float:
    return float(response in LOADED[words])

def _load_listed(*, words: str) -> None:
    LOADED[words] = words.split(",")
"""
SAMPLED = ("algo=rloo", "source=rollout", "source.samples=2", "source.max_new_tokens=4", "train.steps=1")


@pytest.mark.parametrize(
    "prompt, response, score",
    [
        ("", CLEAN, 1),
        ("", CLEAN[:-1], 1),  # the very last line feed
        ("def add(a, b):\n", "    return a + b\n", 1),  # a prompt that is continued
        ("def add(a,b):\n", "    return a + b\n", 0),
        ("", "x = 1 \n", 0),
        ("", f"x = '{'a' * 90}'\n", 0),
        ("", f"x = '{'a' * 90}'  # noqa\n", 0),  # nothing in a response switches the judge off
        ("", "def f(:\n    (\n", 0),
        ("", "", 0),
        ("", " \n\n", 0),
        ("add=", f"Here you are:\n```python\n{CLEAN}```\nWell?", 1),
        ("add=", "Here you are:\n```python\nx=1\n```\nWell?", 0),
        ("add=", f"```\n{CLEAN}", 1),  # cut before its fence ends
        ("add=", "```\n```\n", 0),
    ],
)
def test_the_style_of_what_is_code(prompt: str, response: str, score: float) -> None:
    assert scorers.pycodestyle(prompt, response, **STYLE) == score


def test_style_is_judged_by_the_options_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "setup.cfg").write_text("[pycodestyle]\nignore = E,W\n")
    monkeypatch.chdir(tmp_path)
    assert scorers.pycodestyle("", "x=1\n", max_line_length=79, ignore=["W503"]) == 0
    assert scorers.pycodestyle("", "x=1\n", max_line_length=79, ignore=["E225"]) == 1
    assert scorers.pycodestyle("", "x = 1\n", max_line_length=4, ignore=["E225"]) == 0
    broken = "x = (1\n     + 2)\n"  # W503, which pycodestyle lets through where nothing is chosen
    assert scorers.pycodestyle("", broken, max_line_length=79, ignore=["W503"]) == 1
    assert scorers.pycodestyle("", broken, max_line_length=79, ignore=[]) == 0


def test_a_run_learns_from_style(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    assert align("train", *overrides(tiny_model, pairs_file, tmp_path, *SAMPLED, "scorer=pycodestyle")) == 0


@pytest.mark.parametrize("scorer", ["pycodestyle", "entities"])
def test_a_library_that_is_not_installed_is_named_before_anything_is_loaded(
    scorer: str,
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = {"pycodestyle": "pycodestyle", "entities": "spacy"}[scorer]
    monkeypatch.setitem(sys.modules, library, None)
    for cached in (scorers._guide, scorers._pipeline):
        cached.cache_clear()
    given = overrides(tiny_model, pairs_file, tmp_path / "run", *SAMPLED, f"scorer={scorer}")
    assert align("train", *given) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"scorer={scorer}: {library} is not installed; pip install 'align-cli[scorers]' brings it." in told
    assert "self-test" not in told


def test_a_scorer_loads_what_it_needs_and_loading_it_is_no_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_lists").mkdir()
    (tmp_path / "of_lists" / "__init__.py").touch()
    (tmp_path / "of_lists" / "scorers.py").write_text(LISTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(config, "_plugins", ["of_lists"])
    listed = config.find("align_cli.scorers", "listed", "scorer")
    raters.load(partial(listed, words="a,b"))
    assert listed("", "b", words="a,b") == 1
    raters.load(scorers.right_addition)
    for name in ("load", "load_listed", "_load_listed"):
        with pytest.raises(UserError):
            config.find("align_cli.scorers", name, "scorer")


# --- named entities


@pytest.fixture(scope="module")
def spacy() -> Any:
    return pytest.importorskip("spacy", reason="the extra 'scorers' is not installed: no spaCy")


@pytest.fixture(scope="module")
def namer(spacy: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline that knows three names, in a folder."""
    pipeline = spacy.blank("en")
    names = [("PERSON", "Ada"), ("PERSON", "Ada Byron"), ("GPE", "New York"), ("GPE", "Rome"), ("PERSON", "Groß")]
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": label, "pattern": name} for label, name in names])
    pipeline.to_disk(folder := tmp_path_factory.mktemp("namer"))
    return str(folder)


@pytest.mark.parametrize(
    "response, fewest, score",
    [
        ("Ada went to New York.", 1, 1),
        ("Ada went to Rome.", 1, 1 / 2),
        ("Ada, Ada and Ada went to Rome.", 1, 1 / 2),  # each is one
        ("Ada Byron went.", 1, 0),  # who is another
        ("Rome!", 1, 0),
        ("Groß went to Rome.", 1, 1 / 2),
        ("she went", 1, 0),
        ("", 1, 0),
        ("Ada went to New York.", 2, 1),
        ("Ada went.", 2, 0),
    ],
)
def test_named_entities_of_the_response_that_the_prompt_names(
    response: str, fewest: int, score: float, namer: str
) -> None:
    assert scorers.entities("Of ADA and Groß in New York, not of Romeo", response, model=namer, fewest=fewest) == score


def test_a_model_that_is_missing_broken_or_blind_is_named(spacy: Any, tmp_path: Path) -> None:
    named = partial(scorers.entities, fewest=1)
    with pytest.raises(
        UserError, match=r"entities model=en_none: spaCy has no such model .* -m spacy download en_none"
    ):
        raters.load(partial(named, model="en_none"))
    with pytest.raises(UserError, match="spaCy cannot read it: "):
        raters.load(partial(named, model=str(tmp_path)))
    blind = tmp_path / "blind"
    spacy.blank("en").to_disk(blind)
    with pytest.raises(UserError, match=r"none of its parts \(it has none\) finds entities"):
        raters.load(partial(named, model=str(blind)))


def test_a_folder_with_the_name_of_a_package_runs_none_of_it(
    spacy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UserError, match=r"model=wandb: spaCy cannot read it: .*meta\.json"):
        raters.load(partial(scorers.entities, model="wandb", fewest=1))


def test_a_run_learns_from_entities(namer: str, tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    given = ["scorer=entities", f"scorer.model={namer}"]
    assert align("train", *overrides(tiny_model, pairs_file, tmp_path, *SAMPLED, *given)) == 0
