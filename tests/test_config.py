"""Composition: every choice is one that runs, every key is explained, and parts of one's own are found."""

import json
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from small_runs import align, overrides, read

from align_cli import config, paths, reading, rundir, worker
from align_cli.commands import arguments
from align_cli.errors import UserError
from align_cli.experiment import Experiment

GROUPS = config.group_names()
GIVEN = {"hf": ["model.path=x"], "file": ["data.path=x"]}

# Why a choice of algorithm, model and data may be refused, and the choice that its sentence asks for.
REASONS = {
    "compares two responses": ["data.pairs=best_random"],
    "compares the responses of a prompt": ["data.responses=4"],
    "comes from the embedded world": ["world=addition"],
    "scorer.pattern has to be given": ["scorer.pattern=x"],
    "nothing says how good a sampled response is": ["scorer=compiles"],
}


def compose(*chosen: str) -> config.Tree:
    more = [given for choice in chosen for given in GIVEN.get(choice.partition("=")[2], [])]
    return config.compose("train", [*chosen, *more, "run.dir=run"])


def reads_or_says_why(*chosen: str) -> Experiment:
    """The choice passes the check, or is refused for stated reasons whose remedies pass it; what it describes."""
    more = [given for choice in chosen for given in GIVEN.get(choice.partition("=")[2], [])]
    given = [*chosen, *more, "run.dir=run"]
    for _ in REASONS:
        try:
            return read(given)
        except UserError as error:
            told = str(error).splitlines()
            remedies = [remedy for line in told for reason, remedy in REASONS.items() if reason in line]
            if len(remedies) != len(told):
                raise
            given = [*given, *(override for remedy in remedies for override in remedy)]
    return read(given)


@pytest.mark.parametrize("algo", GROUPS["algo"])
def test_every_algorithm_composes_with_every_dataset(algo: str) -> None:
    for data in GROUPS["data"]:
        assert reads_or_says_why(f"algo={algo}", "model=hf", f"data={data}").algorithm == algo


@pytest.mark.parametrize("model", GROUPS["model"])
def test_every_model_composes_with_data_of_each_kind(model: str) -> None:
    for data in ("file", "toy", "ultrafeedback", "ultrainteract"):
        checked = reads_or_says_why(f"model={model}", f"data={data}")
        assert (checked.model.name, checked.data.name) == (model, data)


@pytest.mark.parametrize("algo, model", list(product(GROUPS["algo"], ["mistral7b", "tiny"])))
def test_every_algorithm_composes_with_a_model_s_usual_data(algo: str, model: str) -> None:
    checked = reads_or_says_why(f"algo={algo}", f"model={model}")
    assert (checked.algorithm, checked.model.name) == (algo, model)


@pytest.mark.parametrize("group", ["adapter", "engine", "launch", "reference", "reward", "track", "divergence"])
def test_every_other_choice_is_checked_by_its_own_name(group: str) -> None:
    for choice in GROUPS[group]:
        tree = compose(f"{group}={choice}", "algo=exo")
        assert tree[group]["name"] == choice


def test_a_model_names_its_usual_data_and_the_command_line_overrides_it() -> None:
    usual = compose("model=mistral7b")
    assert usual["data"]["name"] == "ultrafeedback" and usual["adapter"]["name"] == "lora"
    assert usual["train"]["lr"] == 5e-6  # the paper's setting for this pair
    other = compose("model=mistral7b", "data=hh", "train.lr=1")
    assert other["data"]["name"] == "hh" and other["train"]["lr"] == 1


def test_text_with_any_characters_can_be_quoted() -> None:
    for text in ("a b", "a,b", "it's", 'a"b', "a=b", "a\\", "a\\'b", "(x)", "[1", "null", "1e-3", "{a: 1}", "ä 中"):
        (override,) = config.parse([f"data.path={config.quoted(text)}"])
        assert override.value() == text


def yaml_lines() -> Iterator[tuple[Path, str]]:
    for path in sorted(paths.conf().rglob("*.yaml")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield path, line


def test_a_folder_may_have_target_in_its_name() -> None:
    tree = config.compose("train", ["run.dir=runs/reaches_its_target_1", "data.path=_targets_/x"])
    assert tree["run"]["dir"] == "runs/reaches_its_target_1"
    for code in ("algo._target_=x", "+algo={_target_: x}", "+algo={'_target_': x}", "data.path=[{_target_:x}]"):
        with pytest.raises(UserError, match="_target_"):
            config.compose("train", [code])


def test_every_key_has_a_comment() -> None:
    """But for names, values that a comment at the top explains (settings), nulls, and a model's own configuration."""
    bare: list[str] = []
    architecture = defaults = False
    for path, line in yaml_lines():
        entry = re.match(r"(\s*)(\w+):(.*)", line)
        if entry is None:
            continue
        indent, key, value = entry.groups()
        if key in ("architecture", "defaults"):
            architecture, defaults = key == "architecture", key == "defaults"
        elif not indent or (architecture and indent == "  "):
            architecture = defaults = False
        nested = not value.strip() or architecture or defaults
        if path.parent.name in ("setting", "algo_setting") or key == "name" or nested or value.strip() == "null":
            continue
        if "#" not in value:
            bare.append(f"{path.relative_to(paths.conf())}: {line}")
    assert bare == []


def test_every_file_says_what_it_is() -> None:
    for path in paths.conf().rglob("*.yaml"):
        head = path.read_text(encoding="utf-8").splitlines()[:2]
        assert any(line.startswith("# ") and not line.startswith("# @package") for line in head), path


def test_a_wrong_key_gets_the_nearest_right_one() -> None:
    assert config.did_you_mean("alhpa", ["alpha", "beta"]) == " Did you mean 'alpha'?"
    assert config.did_you_mean("colour", ["alpha", "beta"]) == ""


# --- parts of one's own

LOSS = """
from torch import Tensor
from torch.nn.functional import logsigmoid
from align_cli.ranges import Positive

def mine(policy: Tensor, reference: Tensor, pairs: Tensor, *, gamma: Positive) -> Tensor:
    margins = gamma * (policy - reference)
    return -(pairs * logsigmoid(margins[..., :, None] - margins[..., None, :])).sum((-2, -1))

def greedy(policy: Tensor, novelty: Tensor) -> Tensor:
    return -policy * advantages
"""
ROWS = """
from align_cli.data.records import Record

def record(row: dict, where: str) -> Record:
    return Record(row["question"], (row["good"], row["bad"]), (1.0, 0.0), where)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with an algorithm and a reader of rows, and the YAML of both."""
    package = f"mine_{tmp_path.name}"
    home = tmp_path / package
    files = {
        "__init__.py": "",
        "losses/__init__.py": "",
        "losses/mine.py": LOSS,
        "losses/greedy.py": LOSS,
        "data/__init__.py": "",
        "data/questions.py": ROWS,
        "conf/algo/mine.yaml": "# Mine\nname: mine\ngamma: 0.5  # larger stays closer\n",
        "conf/algo/greedy.yaml": "# Greedy\nname: greedy\n",
        "conf/data/questions.yaml": "defaults:\n  - file\nname: questions\n",
    }
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield package
    config.use([])
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def test_an_algorithm_of_one_s_own_trains(plugin: str, tiny_model: Path, pairs_file: Path) -> None:
    given = overrides(tiny_model, pairs_file, Path("run"), "algo=mine", "train.steps=2")
    assert align("train", "--plugin", plugin, *given) == 0
    told = rundir.read_config(Path("run"))
    assert told["algo"] == {"name": "mine", "gamma": 0.5}
    assert plugin not in Path("run/config.yaml").read_text(), "a configuration names no code"
    summary: Any = rundir.read_summary(Path("run"))
    assert summary["loss/first"] == pytest.approx(0.6931, abs=1e-3)  # log 2, as the margins are 0


@pytest.mark.parametrize(
    "named, words",
    [
        ("{plugin}.nope", "--plugin {plugin}.nope: there is no such package"),
        ("json.nope.nope", "--plugin json.nope.nope: there is no such package"),
        ("{plugin}.losses.mine", "it is a single file; make it a folder {plugin}/losses/mine with a module"),
    ],
)
def test_what_is_no_package_is_refused(named: str, words: str, plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert align("train", "--plugin", named.format(plugin=plugin), "algo=mine") == 2
    assert words.format(plugin=plugin) in capsys.readouterr().err


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["run.dir=~/run", "model=hf", "model.path='~/model'", "scorer=ensemble", "scorer.paths=['~/one','~/other']"]
    tree = arguments.parse(given).compose()
    assert tree["run"]["dir"] == f"{tmp_path}/run" and tree["model"]["path"] == f"{tmp_path}/model"
    assert tree["scorer"]["paths"] == [f"{tmp_path}/one", f"{tmp_path}/other"]


def test_options_of_one_s_own_algorithm_are_checked(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, words in {
        "algo.gama=1": "Did you mean 'gamma'?",
        "algo.gamma=-1": "algo.gamma=-1: input should be greater than 0",
    }.items():
        assert align("train", "--plugin", plugin, "algo=mine", wrong, "data.pairs=best_worst") == 2
        assert words in capsys.readouterr().err
    assert align("train", "--plugin", plugin, "algo=greedy") == 2
    assert "algo=greedy: nothing provides the column 'novelty'" in capsys.readouterr().err


def test_only_the_command_line_names_a_package(
    plugin: str, tiny_model: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tiny_model, pairs_file, Path("run"), "algo=mine", "train.steps=1")
    assert align("train", *given) == 2
    assert "algo=mine: no such choice" in capsys.readouterr().err
    assert align("train", "--config-dir", f"{plugin}/conf", *given) == 2
    assert "no function mine for it in align_cli.losses; --plugin PACKAGE" in capsys.readouterr().err

    assert align("train", "--plugin", plugin, "launch=prepare", *given) == 0
    assert f"align_cli.worker run --plugin {plugin}" in capsys.readouterr().out
    assert worker.main(["run"]) == 2
    assert "--plugin PACKAGE" in capsys.readouterr().err
    assert worker.main(["run", "--plugin", plugin]) == 0
    assert config.plugins() == ["--plugin", plugin]


def test_rows_of_one_s_own_are_read(plugin: str, tiny_model: Path) -> None:
    rows = [{"question": f"{i}+1=", "good": f"#{i + 1}", "bad": f"#{i}"} for i in range(8)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = overrides(tiny_model, Path("rows.jsonl"), Path("run"), "data=questions", "train.steps=1")
    assert align("train", "--plugin", plugin, *given, "data.held_out=0") == 0


def test_a_plugin_does_not_replace_our_own_parts(plugin: str) -> None:
    Path(plugin, "losses", "nca.py").write_text("def nca(policy, *, alpha: float, beta: float): return policy\n")
    config.use([plugin])
    assert config.find("align_cli.losses", "nca", "algo").__module__ == "align_cli.losses.nca"
    with pytest.raises(UserError, match=r"there is no function dataclass for it in align_cli\.divergences"):
        config.find("align_cli.divergences", "dataclass", "divergence")


def test_a_configuration_without_a_whole_engine_is_refused_in_a_sentence() -> None:
    tree = compose("algo=nca")
    with pytest.raises(UserError, match="engine is missing"):
        reading.read({name: section for name, section in tree.items() if name != "engine"})
    with pytest.raises(UserError, match="engine=5: give a section with keys"):
        reading.read({**tree, "engine": 5})


def test_a_folder_may_be_called_as_a_key_that_chooses_code() -> None:
    config.refuse_code(["run.dir=/runs/a_target_b", "data.path=_targets_"])
    with pytest.raises(UserError, match="'_target_' is not taken"):
        config.refuse_code(["+x={_target_:os.system}"])
