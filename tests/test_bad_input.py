"""What bad input gets: one clear sentence for each mistake, exit code 2, and nothing written.

Each case is a command line, or a file, and the words that its error must have: the key or file:line, what was given
and how to fix it.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from small_runs import align, overrides

from align_cli import distributed, resources, rundir, worker
from align_cli.errors import UserError

Command = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in an empty folder, without network and without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def train(tiny_model: Path, pairs_file: Path) -> Command:
    """A small run that would be right, with more arguments; it writes into ./run."""

    def command(*more: object) -> list[str]:
        return ["train", *overrides(tiny_model, pairs_file, Path("run"), "train.steps=1", *map(str, more))]

    return command


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The errors of a command that is a user's mistake and writes nothing into the current folder."""

    def errors(*command: str, code: int = 2) -> list[str]:
        before = listing(Path())
        capsys.readouterr()
        assert align(*command) == code
        told = capsys.readouterr()
        assert "Traceback" not in told.err + told.out
        assert listing(Path()) == before
        return [line.removeprefix("error: ") for line in told.err.splitlines() if line.startswith("error: ")]

    return errors


def listing(folder: Path) -> dict[str, bytes]:
    """All that is in a folder; locks are empty or somebody's."""
    files = (path for path in sorted(folder.rglob("*")) if path.name != rundir.LOCK)
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in files}


def says(errors: list[str], *words: str) -> None:
    """One error, with these words in it."""
    assert len(errors) == 1, errors
    for word in words:
        assert word in errors[0], errors


# --- the command line

COMMAND_LINES = {
    # keys
    "algo.alhpa=1": ("algo.alhpa: no such key", "Did you mean 'alpha'?", "takes alpha, beta"),
    "trian.lr=1": ("trian: no such key", "Did you mean 'train'?"),
    "+algo.gamma=3": ("algo.gamma: no such key", "alpha, beta"),
    "data.expected={promts:3}": ("data.expected", "promts"),
    "reference.colour=1": ("reference.colour: no such key", "name, path"),
    "=1": ("=1", "write key=value, such as"),
    "algo.alpha": ("algo.alpha", "write key=value, such as"),
    "~algo.alpha": ("algo.alpha is missing",),
    "algo/sub=1": ("algo/sub=1", "Did you mean 'algo'?"),
    "algo@train=dpo": ("algo@train=dpo", "algo=nca"),
    # choices
    "algo=ncaa": ("algo=ncaa: no such choice", "Did you mean 'nca'?", "cdpo, dpo, exo"),
    "model=mistral": ("model=mistral: no such choice", "mistral7b"),
    "setting=none": ("setting=none: no such choice", "mistral7b-ultrafeedback"),
    "data=../x": ("data=../x: no such choice", "ultrafeedback"),
    "algo=null": ("algo=null: no such choice", "nca"),
    "algo=5": ("algo=5: no such choice", "nca"),
    "algo=": ("algo=: no such choice", "nca"),
    "algo=[nca,dpo]": ("algo=[nca,dpo]: no such choice", "nca"),
    "~algo": ("~algo: no such choice", "nca"),
    "algo=/etc/passwd": ("algo=/etc/passwd: no such choice", "nca"),
    "algo.name=dpo": ("algo.name=dpo", "use algo=dpo."),
    # types and ranges
    "train.lr=abc": ("train.lr=abc", "valid number"),
    "train.lr=nan": ("train.lr=nan", "finite number"),
    "train.lr=inf": ("train.lr=inf", "finite number"),
    "train.lr=-1": ("train.lr=-1", "greater than 0"),
    "train.prompts=1.5": ("train.prompts=1.5", "valid integer"),
    "train.prompts=0": ("train.prompts=0", "at least 1|greater than or equal to 1"),
    "train.epochs=true": ("train.epochs=true", "valid integer"),
    "train.warmup_ratio=2": ("train.warmup_ratio=2", "less than or equal to 1"),
    "train.schedule=sine": ("train.schedule=sine", "'cosine', 'linear' or 'constant'"),
    "optimizer.betas=[1]": ("optimizer.betas=[1]", "give two numbers"),
    "optimizer.betas=[0.9,2]": ("optimizer.betas[1]=2", "less than or equal to 1"),
    "adapter.targets=q_proj": ("adapter.targets=q_proj", "list or 'all-linear'"),
    "train=5": ("train=5", "a section with keys"),
    "run=null": ("run=null", "a section with keys"),
    "~train": ("train", "a section with keys"),
    "run.dir=": ("run.dir=", "at least 1 character"),
    "resume=always": ("resume=always", "auto or never"),
    "data.path=null": ("data.path=null", "file, folder or hub id"),
    "data.path=???": ("data.path has to be given",),
    "model.path=null": ("model.path=null", "valid string"),
    "train.lr=${train.nothing}": ("train.lr=${train.nothing}", "there is no train.nothing"),
    # several values
    "algo=nca,dpo": ("algo=nca,dpo", "align train -m", "quote it"),
    "algo.alpha=0.1,0.2": ("algo.alpha=0.1,0.2", "align train -m"),
    "algo.alpha=range(1,3)": ("algo.alpha=range(1,3)", "align train -m"),
    "data.path=(x": ("data.path=(x: cannot be read", "data.path=\"'(x'\""),
    # options
    "--multirnu": ("--multirnu: no such option", "Did you mean '--multirun'?"),
    "--config-dir=nowhere": ("--config-dir nowhere: no such folder",),
    "--config-dir": ("--config-dir needs a folder",),
    "--plugin=no_such_package": ("--plugin no_such_package: there is no such package", "PYTHONPATH"),
    "--plugin=../x": ("--plugin ../x: there is no such package",),
    # code
    "algo._target_=os.system": ("'_target_' is not taken", "chosen by name"),
    "algo={_target_: os.system}": ("'_target_' is not taken", "chosen by name"),
    "hydra.callbacks.x=1": ("hydra.callbacks.x=1", "settings are fixed"),
    "+hydra.run.dir=x": ("+hydra.run.dir=x", "settings are fixed"),
    "hydra/launcher=basic": ("hydra/launcher=basic", "settings are fixed"),
    "'hydra.callbacks.x'=1": ("hydra.callbacks.x", "settings are fixed"),
    "run.dir=${oc.env:HOME}": ("run.dir=${oc.env:HOME}", "no resolvers"),
    "run.dir=${ oc.env:HOME}": ("run.dir=${ oc.env:HOME}", "no resolvers"),
    "run.dir=${oc.env :HOME}": ("no resolvers",),
    "run.dir=${oc.${algo.name}:HOME}": ("no resolvers",),
    "train.lr=[${oc.decode:1}]": ("no resolvers",),
    "${oc.env:HOME}=1": ("no resolvers",),
    # secrets
    "wandb.api_key=local-123": ("'wandb.api_key' names a secret", "WANDB_API_KEY"),
    "data.path=https://me:pass@host/x": ("the address in 'data.path' contains a password",),
    # combinations without meaning
    "divergence=js": ("algo=nca divergence=js", "no divergence to choose", "algo=f_dpo"),
    "algo=f_dpo divergence=null": ("algo=f_dpo needs a divergence", "reverse_kl"),
    "algo=kto reward=hard": ("algo=kto reward=hard", "all would be undesirable", "algo.threshold=-1"),
    "algo=exo reward=smoothed reward.label_smoothing=0.6": ("reward.label_smoothing=0.6", "less than 0.5"),
    "algo=exo reward=hard": ("algo=exo reward=hard", "finite rewards", "reward=smoothed"),
    "algo=dpo reward=smoothed": ("reward.alpha=${algo.alpha}", "there is no algo.alpha", "another choice"),
    "algo=dpo reward=smoothed reward.alpha=1": ("algo=dpo reward=smoothed", "algo=cdpo"),
    "algo=sft data.responses=2": ("algo=sft", "data.responses=2", "data.responses=1 keeps the best"),
    "data.responses=1": ("algo=nca", "data.responses=1 gives one"),
    "algo=dpo data.responses=4": ("algo=dpo compares two", "data=file gives 4", "data.pairs=best_random"),
    "reference=adapter": ("reference=adapter", "there are none", "adapter=lora"),
    "reference=cached reference.path=x": ("reference=cached reference.path=x", "reference=frozen"),
    "adapter.rank=4": ("rank, scale and targets belong together", "adapter=lora"),
    "adapter=qlora engine=zero3": ("adapter=qlora engine=zero3", "engine=zero2"),
    "engine=torch launch.devices=2": ("engine=torch launch.devices=2", "one process", "zero3", "auto"),
    # a machine without a GPU
    "launch.accelerator=gpu": ("launch.accelerator=gpu", "no GPU", "auto or cpu"),
    "adapter=qlora": ("adapter=qlora", "need a GPU", "adapter=lora"),
    # models
    "model.path=/no/such/folder": ("model.path=/no/such/folder", "no such folder"),
    "model.path=": ("model.path=", "no such folder"),
    "model.path=no/such": ("model.path=no/such", "config.json and safetensors, or a hub id"),
    "reference=frozen reference.path=no/such": ("reference.path=no/such", "no model can be read"),
    "adapter=lora adapter.targets=[nolayer]": ("adapter.targets=['nolayer']", "not found in the base model"),
    # data
    "data.path=nothere.jsonl": ("data.path=nothere.jsonl: there is no such file or folder",),
    "data.path=no/such": ("data.path=no/such: neither a file or folder", "copy the dataset"),
    "data.path=": ("data.path=", "at least 1 character"),
    "data.format=csv": ("data.format=csv", "'preference'"),
    "data.template=chat": ("data.template=chat", "no chat template", "data.template=text"),
    "data.max_length=3": ("too long", "data.max_length=3", "Raise the limit"),
    "data.max_length=3 data.truncation=error": (":1:", "data.truncation=error", "Raise the limit"),
    # directories
    "run.dir=/dev/null/x": ("run.dir=/dev/null/x cannot be written", "Not a directory"),
    "run.dir=/proc/x": ("run.dir=/proc/x cannot be written",),
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_wrong_command_line_is_refused_with_one_sentence(
    line: str, train: Command, refused: Callable[..., list[str]]
) -> None:
    together = line.startswith(("algo={", "train.lr=[", "run.dir=${"))
    errors = refused(*train(*([line] if together else line.split(" "))))
    assert len(errors) == 1, errors
    for words in COMMAND_LINES[line]:
        assert any(word in errors[0] for word in words.split("|")), errors


def test_all_mistakes_are_told_at_once(train: Command, refused: Callable[..., list[str]]) -> None:
    errors = refused(*train("train.lr=-1", "algo.alpha=x", "data.keep=worst", "foo=1", "train.stepz=3"))
    assert [error.partition(":")[0] for error in sorted(errors)] == [
        "algo.alpha=x",
        "data.keep=worst",
        "foo",
        "train.lr=-1",
        "train.stepz",
    ]
    assert len(refused(*train("algo=ncaa", "model=x", "algo.alpha=1,2"))) == 3
    assert len(refused(*train("reference=adapter", "divergence=js", "engine=torch", "launch.devices=2"))) == 3
    assert len(refused("train", "--foo", "--bar")) == 2


def test_a_secret_is_not_repeated(train: Command, refused: Callable[..., list[str]]) -> None:
    errors = refused(*train("track.project=hf_" + "a1" * 20))
    says(errors, "'track.project'", "HF_TOKEN")
    assert "a1a1" not in errors[0]


OTHER_COMMANDS = {
    "trian": ("trian: no such command", "Did you mean 'train'?", "align --help"),
    "--foo": ("--foo: no such command", "align --help"),
    "plan algo=nca,dpo": ("algo=nca,dpo", "align train -m"),
    "plan -m algo=nca": ("-m", "only align train"),
    "plan data=file": ("data.path has to be given",),
    "plan model=hf model.path=x": ("data=toy comes from the embedded world", "model=tiny"),
    "data shwo": ("the subcommand is show",),
    "data show index=-1": ("index=-1", "from 0 on"),
    "data show index=x": ("index=x", "from 0 on"),
    "data show run=null": ("run=null", "a section with keys"),
    "train -m algo=nca,dpoo": ("algo=dpoo: no such choice", "'dpo'"),
    "train -m algo.alpha=1,x": ("algo.alpha=x", "valid number"),
    "train -m algo.alpha=1,1": ("same values",),
    "train -m algo.alpha=1,2 algo.alpha=3": ("algo.alpha=1,2", "given twice", "all its values"),
    "train -m algo.alpha=3 +algo.alpha=1,2": ("+algo.alpha=1,2", "given twice"),
    "train -m algo.alpha=interval(0,1)": ("algo.alpha=interval(0,1)", "choice(...) or range(...)"),
    "train -m algo.alpha=glob(*)": ("algo.alpha=glob(*)", "choice(...) or range(...)"),
    "ls algoo": ("there is no group 'algoo'", "algo"),
    "show infonca": ("'infonca'", "info_nca"),
    "show no/such/run": ("'no/such/run'",),
    "cp nca /proc/x.yaml": ("/proc/x.yaml cannot be written",),
    "cp nca /etc/passwd/x": ("/etc/passwd exists",),
    "export nowhere dest": ("nowhere is not a run directory",),
    "-sc install=tcsh": ("align -sc install=bash",),
}


@pytest.mark.parametrize("line", OTHER_COMMANDS)
def test_other_commands_refuse_as_clearly(line: str, refused: Callable[..., list[str]]) -> None:
    says(refused(*line.split(" ")), *OTHER_COMMANDS[line])


LINES = {
    "export": ("align export: the following arguments are required: run, dest. See align export --help.",),
    "export run dest more": ("align export: unrecognized arguments: more.",),
    "show": ("align show: the following arguments are required: name. See align show --help.",),
    "cp nca": ("align cp: the following arguments are required: destination.",),
    "doctor --all": ("align doctor: unrecognized arguments: --all.",),
    "ls --all": ("unrecognized arguments: --all.",),
    "compare": ("align compare: the following arguments are required: RUN_OR_SWEEP.",),
    "report --out x": ("align report: ",),
    "verify --jso": ("align verify: unrecognized arguments: --jso.",),
    "cache": ("align cache: ",),
    "cache gc --older-than long": ("align cache gc: argument --older-than: invalid float value: 'long'.",),
}


@pytest.mark.parametrize("line", LINES)
def test_commands_with_arguments_of_their_own_refuse_alike(line: str, refused: Callable[..., list[str]]) -> None:
    says(refused(*line.split()), *LINES[line])


# --- rows

PAIR = {"prompt": "1+1=", "chosen": "#2", "rejected": "#3"}
FOUR = {"prompt": "1+1=", "completions": ["#2", "#3", "#4", "#5"], "rewards": [1, 2, 3, 4]}


def turns(*said: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=False)]


ROWS: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "an empty file": ([], ("rows.jsonl holds no rows", "data.path")),
    "blank lines": (["", "  "], ("rows.jsonl holds no rows",)),
    "not JSON": ([PAIR, '{"prompt": '], ("rows.jsonl:2: not JSON", "data.bad_rows")),
    "no object": ([PAIR, "[1]"], ("rows.jsonl:2: a JSON list where an object should be",)),
    "not text": ([PAIR, "\0"], ("rows.jsonl:2:", "NUL byte")),
    "a key twice": (['{"prompt": "a", "prompt": "b"}'], ("rows.jsonl:1: the key 'prompt' stands twice",)),
    "an unknown schema": ([{"colour": "red"}], ("rows.jsonl:1:", "colour")),
    "unequal lengths": ([FOUR | {"rewards": [1, 2]}], ("rows.jsonl:1: 4 completions but 2 rewards",)),
    "a reward that is NaN": (['{"prompt":"a","completions":["b","c"],"rewards":[1,NaN]}'], ("rewards[1] is nan",)),
    "a reward that is null": ([FOUR | {"rewards": [1, None, 3, 4]}], ("rows.jsonl:1: rewards[1] is missing",)),
    "a reward that is text": ([FOUR | {"rewards": ["good"] * 4}], ("rewards[0] is str 'good'", "a number")),
    "no rewards": ([{"prompt": "a", "completions": ["b", "c"]}], ("rows.jsonl:1:", "'rewards'")),
    "an empty response": ([PAIR | {"rejected": " "}], ("rows.jsonl:1: response 1 of 2 is empty",)),
    "an empty prompt": ([PAIR | {"prompt": ""}], ("rows.jsonl:1: the prompt is empty",)),
    "another prompt": (
        [{"prompt": turns("9+9="), "chosen": turns("1+1=", "#2"), "rejected": turns("1+1=", "#3")}],
        ("rows.jsonl:1: the prompt is not a prefix of chosen and rejected",),
    ),
    "one response to compare": ([{"prompt": "1+1=", "completion": "#2"}] * 8, ("algo=nca compares", "algo=sft")),
    "beyond the model's positions": (
        [PAIR | {"chosen": "#2" * 200}],
        ("data.max_length=2048", "128 positions", "data.max_length=128"),
    ),
}


def write(rows: list[Any], path: Path = Path("rows.jsonl")) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return f"data.path={path}"


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_are_named_by_file_and_line(name: str, train: Command, refused: Callable[..., list[str]]) -> None:
    rows, words = ROWS[name]
    says(refused(*train(write(rows), "data.held_out=0")), *words)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("rows.csv", "a,b", ("rows.csv: unknown kind of file", ".jsonl")),
        ("rows.parquet", "a,b", ("rows.parquet: not a Parquet file",)),
        ("rows.arrow", "a,b", ("rows.arrow: not an Arrow file",)),
        ("rows.json", "3", ("rows.json: a JSON int where a list of rows should be",)),
        ("rows.jsonl.gz", "{}", ("rows.jsonl.gz:1: the compressed file is damaged",)),
    ],
)
def test_a_file_of_the_wrong_kind_is_named(
    name: str, content: str, words: tuple[str, ...], train: Command, refused: Callable[..., list[str]]
) -> None:
    Path(name).write_text(content)
    says(refused(*train(f"data.path={name}")), *words)


def test_a_folder_without_rows_is_named(train: Command, refused: Callable[..., list[str]]) -> None:
    Path("folder").mkdir()
    says(refused(*train("data.path=folder")), "folder has no file for the split 'train'", "data.split")


def test_losses_that_compare_two_ask_how_when_the_rows_bring_more(
    train: Command, refused: Callable[..., list[str]]
) -> None:
    says(refused(*train("algo=dpo", write([FOUR]))), "rows.jsonl:1: 4 responses", "data.pairs", "best_worst")
    ties = FOUR | {"completions": ["#2", "#3"], "rewards": [1, 1]}
    says(refused(*train("algo=dpo", write([ties]))), "no row of rows.jsonl prefers one response to another")


def test_bad_rows_are_skipped_up_to_a_limit_and_counted(
    train: Command, refused: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write([PAIR, PAIR | {"rejected": ""}, "{", *[PAIR | {"prompt": f"{i}+1="} for i in range(6)]])
    says(refused(*train(rows, "data.bad_rows=1", "data.held_out=0")), "rows.jsonl:3", "data.bad_rows=1")
    assert align(*train(rows, "data.bad_rows=2", "data.held_out=0")) == 0
    told = capsys.readouterr().err
    assert "9 rows: 7 to train on" in told and "2 malformed (rows.jsonl:2: response 1 of 2 is empty" in told


def test_data_show_refuses_a_place_beyond_the_end(
    tiny_model: Path, pairs_file: Path, refused: Callable[..., list[str]]
) -> None:
    given = overrides(tiny_model, pairs_file, Path("run"))
    says(refused("data", "show", "index=99", *given), "index=99", "prompts 0 to 19")


# --- models


@pytest.fixture
def model(tiny_model: Path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    shutil.copytree(tiny_model, "model")
    return Path("model")


def test_weights_in_pickles_are_never_read(model: Path, train: Command, refused: Callable[..., list[str]]) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    says(refused(*train("model.path=./model")), "model.path=./model", "only pytorch_model.bin", "safetensors")
    (model / "pytorch_model.bin").unlink()
    says(refused(*train("model.path=./model")), "no weights", "safetensors")


def test_weights_that_are_missing_do_not_start_at_random(
    model: Path, train: Command, refused: Callable[..., list[str]]
) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    says(refused(*train("model.path=./model")), "model.path=./model", "model.layers.1.mlp.up_proj.weight", "at random")


def test_a_tokenizer_of_another_model_is_refused(
    model: Path, train: Command, refused: Callable[..., list[str]]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 5}))
    says(refused(*train("model.path=./model")), "model.path=./model", "tokenizer gives token", "know 5 tokens")


def test_code_that_comes_with_a_model_is_never_run_and_never_asked_for(
    model: Path, train: Command, refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question on stdin")

    monkeypatch.setattr("builtins.input", asked)
    told = json.loads((model / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own"}
    (model / "config.json").write_text(json.dumps(told | code))
    (model / "own.py").write_text("raise SystemExit('the code of the model has run')")
    says(refused(*train("model.path=./model")), "model.path=./model", "code is never run")


def test_broken_models_are_refused(model: Path, train: Command, refused: Callable[..., list[str]]) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:2000])
    says(refused(*train("model.path=./model")), "model.path=./model", "weights cannot be read")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    says(refused(*train("model.path=./model")), "model.path=./model", "no tokenizer", "tokenizer.json")
    (model / "config.json").write_text('{"model_type": "vit"}')
    says(refused(*train("model.path=./model")), "'vit' is not a causal language model")
    (model / "config.json").write_text("{")
    says(refused(*train("model.path=./model")), "model.path=./model", "not a valid JSON file")


# --- files of the user's own

FILES = {
    "name: nca\nalpha: 1.0\nbeta: 1.0\n_target_: os.system\n": ("algo: '_target_' is not taken", "chosen by name"),
    "name: nca\nalpha: ${oc.env:HOME}\nbeta: 1.0\n": ("algo.alpha=${oc.env:HOME}", "no resolvers"),
    "name: nca\nalpha: ${ oc.env:HOME}\nbeta: 1.0\n": ("algo.alpha=${ oc.env:HOME}", "no resolvers"),
    "name: nca\nalpha: 1.0\nbeta: ${algo.beta}\n": ("algo.beta", "Recursive"),
    "name: nca\nalpha: ???\nbeta: 1.0\n": ("algo.alpha has to be given",),
    "name: nca\nalpha: .nan\nbeta: 1.0\n": ("algo.alpha=nan", "finite"),
    "name: nca\nalpha: 1.0\n": ("algo.beta is missing",),
    "name: os.system\n": ("algo.name=os.system", "letters, digits and underscores"),
    "name: nothere\n": ("algo.name=nothere", "align_cli.losses", "--plugin"),
    "alpha: 1.0\n": ("algo.name is missing",),
    "name: [nca\nalpha: 1\n": ("mine.yaml:2: not YAML",),
    "name: nca\nname: dpo\n": ("mine.yaml:2: not YAML", "duplicate key"),
    "name: !!python/object/apply:os.system [id]\n": ("mine.yaml:1: not YAML", "python/object"),
    "5\n": ("int",),
    "defaults:\n  - other\nname: nca\n": ("algo/mine", "Could not load 'algo/other'"),
    "# @package _global_\nhydra:\n  callbacks:\n    x: {_target_: os.system}\n": ("hydra.callbacks", "fixed"),
    "# @package _global_\nhydra:\n  job:\n    env_set: {A: b}\n": ("hydra.job", "fixed"),
    "# @package _global_\nhydra:\n  searchpath: [pkg://x]\n": ("hydra.searchpath",),
}


@pytest.mark.parametrize("group", ["algo", "setting"])
@pytest.mark.parametrize("text", FILES)
def test_a_file_of_a_config_dir_holds_values_only(
    group: str, text: str, train: Command, refused: Callable[..., list[str]]
) -> None:
    path = Path("mine", group, "mine.yaml")
    path.parent.mkdir(parents=True)
    package = "# @package algo\n" if group == "setting" and not text.startswith("#") else ""
    if group == "setting" and text.startswith("alpha"):
        return  # a setting is a difference, and this one is right
    if package and any("missing" in word or "has to be given" in word for word in FILES[text]):
        return  # what is missing here is in the algorithm's own file
    path.write_text(text if not package else package + text)
    words = [word.replace(":2:", ":3:").replace(":1:", ":2:") if package else word for word in FILES[text]]
    errors = refused(*train("--config-dir=mine", f"{group}=mine"))
    says(
        errors, *(word.replace("algo/mine", f"{group}/mine").replace("algo/other", f"{group}/other") for word in words)
    )


# --- run directories


def test_a_directory_that_holds_something_else_is_left_alone(train: Command, refused: Callable[..., list[str]]) -> None:
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("ten years of work")
    says(refused(*train()), "run.dir=run is not empty and holds no run", "new folder")
    Path("file").write_text("x")
    says(refused(*train("run.dir=file")), "run.dir=file is a file")
    says(refused(*train("run.dir=file/below")), "run.dir=file/below cannot be written")


def test_a_directory_in_use_is_left_alone(train: Command, refused: Callable[..., list[str]]) -> None:
    with rundir.lock(Path("run")):
        says(refused(*train()), "run.dir=run is in use by process", "choose another run.dir")


def test_a_mistake_leaves_an_empty_folder_empty(train: Command, refused: Callable[..., list[str]]) -> None:
    Path("run").mkdir()
    says(refused(*train("data.path=nothere.jsonl")), "nothere.jsonl")
    assert list(Path("run").iterdir()) == []


def test_only_the_same_run_is_resumed(
    train: Command,
    refused: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = partial(train, "checkpoint.every=1", "train.steps=3")
    assert align(*again()) == 0
    says(refused(*again("algo.alpha=0.5")), "run.dir=run", "algo.alpha: 0.0001 -> 0.5", "a new folder")
    says(refused(*again("resume=never")), "run.dir=run holds a run already", "resume=auto")
    assert align(*again()) == 0
    assert "finished already" in capsys.readouterr().out

    Path("run/summary.json").write_text("{")
    says(refused(*again()), "summary.json is damaged")
    says(refused("show", "run"), "summary.json is damaged")
    Path("run/summary.json").unlink()
    (config := Path("run/config.yaml")).write_text(config.read_text().replace("devices: null", "devices: 1"))
    says(refused(*again("launch.devices=1", "engine=zero1")), "engine.name: 'torch' -> 'zero1'")
    with monkeypatch.context() as patch:
        patch.setattr(resources, "devices", lambda _: 3)
        says(refused(*again("launch.devices=1")), "of 1 rank(s)", "gives 3", "launch.devices=1")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        told = yaml.safe_load(config.read_text())
        told |= {"engine": told["engine"] | {"name": "zero1"}}
        config.write_text(yaml.safe_dump(told))
        assert worker.main(["run"]) == 2
        assert "prepared for launch.devices=1; 3 ranks were started" in capsys.readouterr().err
        config.write_text(yaml.safe_dump(told | {"launch": told["launch"] | {"devices": None}}))
        assert worker.main(["run"]) == 2
        assert "its checkpoints are of 1 rank(s); 3 were started" in capsys.readouterr().err


def test_an_unfinished_run_is_not_exported(train: Command, refused: Callable[..., list[str]]) -> None:
    assert align(*train()) == 0
    Path("dest").mkdir()
    says(refused("export", "run", "dest"), "dest exists", "new folder")
    Path("run/model/config.json").write_text("{")
    says(refused("export", "run", "new"), "run/model", "cannot be read")
    shutil.rmtree("run/model")
    says(refused("export", "run", "new"), "run/model", "has not finished", "resumes it")


def test_ranks_are_started_by_one_program_only(
    train: Command, refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    says(refused(*train()), "torchrun", "launch=prepare", "align_cli.worker")


def test_each_rank_needs_a_gpu_of_its_own(
    train: Command, refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    given = ("launch.accelerator=gpu", "launch.devices=3", "launch.memory_gb=80")
    says(refused(*train(*given)), "launch.devices=3", "sees 2 GPU(s)", "each rank")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"rank 2 of this node.*PyTorch sees 2.*--gpus-per-node"):
        distributed.local_device("gpu")


def test_a_run_is_prepared_for_gpus_where_there_is_none(train: Command) -> None:
    assert align(*train("launch=prepare", "launch.accelerator=gpu", "launch.devices=1")) == 0
    assert json.loads(Path("run/env.json").read_text())["device"] == "cuda"


def test_a_cache_that_cannot_be_written_is_named(
    train: Command, refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_CACHE", "/dev/null/cache")
    says(refused(*train()), "ALIGN_CACHE=/dev/null/cache cannot be written", "another folder")


# --- a run directory from somebody else


@pytest.fixture
def prepared(train: Command) -> Path:
    """A run that is prepared and not started."""
    assert align(*train("launch=prepare")) == 0
    return Path("run/config.yaml")


CHANGES: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "code": (lambda text: text + "_target_: os.system\n", ("config.yaml", "'_target_' would choose code to run")),
    "hydra": (lambda text: text + "hydra: {callbacks: {}}\n", ("config.yaml", "'hydra'")),
    "a resolver": (lambda text: text.replace("name: nca", "name: ${oc.env:HOME}"), ("'algo.name'", "interpolation")),
    "a YAML tag": (lambda text: text + "x: !!python/object/apply:os.system [id]\n", ("config.yaml is not YAML",)),
    "another module": (lambda text: text.replace("name: nca", "name: os.system"), ("algo.name=os.system",)),
    "an imported name": (lambda text: text.replace("name: given", "name: dataclass"), ("reward.name=dataclass",)),
    "an unknown key": (lambda text: text + "colour: red\n", ("colour: no such key",)),
    "no mapping": (lambda text: "5\n", ("config.yaml holds int",)),
    "a GPU": (lambda text: text.replace("accelerator: cpu", "accelerator: gpu"), ("launch.accelerator=gpu", "no GPU")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_rank_reads_values_only(name: str, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = CHANGES[name]
    prepared.write_text(change(prepared.read_text()))
    capsys.readouterr()
    assert worker.main(["run"]) == 2
    errors = capsys.readouterr().err.splitlines()
    says(errors, *words)
    assert not Path("run/metrics.jsonl").exists()


def test_ranks_have_to_fit_the_engine(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert worker.main(["run"]) == 2
    says(capsys.readouterr().err.splitlines()[-1:], "engine=torch runs in one process; 2 were started", "zero0")


def test_a_rank_without_a_run_makes_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert worker.main(["nowhere"]) == 2
    assert worker.main([]) == 2
    assert worker.main(["run", "--plugin"]) == 2
    assert "usage" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- pipes


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "align_cli.cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 0
    assert errors == ""
