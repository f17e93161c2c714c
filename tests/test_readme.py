"""Every command of the README runs: its chapters are gone through in order, with small models and a few rows.

A command runs as it is written, in a folder where the names that it uses exist; what makes it short is put behind it.
What names weights or data of the hub, or takes minutes, is planned: its configuration is read and nothing is loaded.
"""

import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import small_runs
from forks import Forks
from scripted_judge import Request, scripted
from small_runs import align

from align_cli import config, exits, judges, recipe, sweep
from align_cli.commands import COMMANDS, evaluate, reproduce
from align_cli.verify import examine
from align_cli.verify.checks import Check
from align_cli.verify.examine import Subject

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROWS = Path(__file__).parent / "data" / "rows"


# put behind every command of such a beginning, to make it short
WORLD = (
    "world.demonstrations=200 world.sft_steps=20 world.hidden=32 world.layers=1 world.prompts=24 world.held_out=8 "
    "data.held_out=6"
)
TRAINED = "train.steps=1 train.prompts=4 eval.groups=2 eval.samples=2 eval.prompts=2 launch.accelerator=cpu track=none"
ON_CPU = "accelerator=cpu precision=fp32 max_new_tokens=8"
EVALUATED = "generate.accelerator=cpu generate.precision=fp32 eval.limit=2"
SHORT = {
    r"train": TRAINED,
    r"train(?!.*model=)": WORLD,
    r"train .*data=hh": "data.held_out=1 train.prompts=2",
    r"train .*(source=rollout|algo=(ppo|fdpg))": "source.max_new_tokens=8",
    r"train .*algo=fdpg(?!.*exponential)": "scorer.pattern='1'",
    r"train .*target=exponential": "target.samples=64 target.features.hum.pattern='1'",
    r"evaluate (?!calibrate)": EVALUATED,
    r"evaluate .*eval=(?!rewardbench)": "eval.max_new_tokens=8",
    r"evaluate .*eval=mt_bench": "eval.path=mt_bench.jsonl",
    r"evaluate .*eval=rewardbench": "eval.path=rewardbench.jsonl",
    r"sample": ON_CPU,
    r"chat": ON_CPU,
    r"verify$": "sft",
}

# planned alone
PLANNED = (
    r"(train|score) .*model=mistral7b",  # weights of the hub
    r"evaluate .*eval=(gsm8k,math|humaneval|harness|bbh)",  # data of the hub; tests/evals has rows of their schemas
    r"reproduce",  # minutes; tests/test_reproduction.py runs recipes, and the one of shrink=ROWS as it stands here
)

# no command of align's; tests of their own run them
ELSEWHERE = ("pip install", "scripts/", "torchrun", "srun", "export MASTER_ADDR")


def chapters() -> dict[str, list[str]]:
    """The commands of each chapter, without what is said beside them."""
    text = re.sub(r"\\\n +", " ", README)
    found: dict[str, list[str]] = {}
    chapter = ""
    for line in text.splitlines():
        if line.startswith("#"):
            chapter = line.lstrip("# ")
        if re.match(r" {4}(align|printf|export|pip|torchrun|srun|scripts/)", line):
            found.setdefault(chapter, []).append(re.split(r" {3,}|  +#", line.strip())[0].strip())
    return found


CHAPTERS = chapters()


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_package(home: Path) -> None:
    """The package whose two files the README shows, with a body for the function."""
    for name, signature in re.findall(r"^ {4}mine/losses/(\w+)\.py +(def .*)$", README, re.MULTILINE):
        (home / "losses").mkdir(parents=True)
        (home / "conf" / "algo").mkdir(parents=True)
        text = f"from torch import Tensor\nfrom align_cli.ranges import Positive\n\n{signature}:\n"
        (home / "losses" / f"{name}.py").write_text(
            f"{text}    return (beta * (policy - reference) - rewards).square().sum(-1)\n"
        )
        (yaml,) = re.findall(rf"^ {{4}}mine/conf/algo/{name}\.yaml +(.*)\n +(.*)$", README, re.MULTILINE)
        (home / "conf" / "algo" / f"{name}.yaml").write_text("\n".join(yaml) + "\n")


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands name."""
    home = tmp_path_factory.mktemp("readme") / "stage"
    home.mkdir()
    model = small_runs.build_reader(home / "FOLDER", seed=0)
    shutil.copytree(model, home / "Qwen" / "Qwen2.5-0.5B")
    given = ["model=hf", f"model.path={model}", "data=toy", "world=addition", *WORLD.split(), *TRAINED.split()]
    assert align("train", *given, f"run.dir={home / 'RUN'}", "algo=nca") == exits.DONE
    assert align("train", *given, f"run.dir={home / 'REWARD_RUN'}", "algo=bradley_terry") == exits.DONE
    for name in ("OTHER_RUN", "runs/before", "sweeps/tiny-toy-1a2b3c4d/0", "sweeps/tiny-toy-1a2b3c4d/1"):
        shutil.copytree(home / "RUN", home / name)
    shutil.copytree(home / "REWARD_RUN" / "model", home / "REWARD_MODEL")
    (home / "ROWS" / "helpful-base").mkdir(parents=True)
    for split in ("train", "test"):
        shutil.copy(ROWS / "hh.jsonl", home / "ROWS" / "helpful-base" / f"{split}.jsonl")
    write_package(home / "mine")
    write(home / "prompts.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}]}, {"prompt": "Why?"}])
    write(home / "rows.jsonl", [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(8)])
    write(home / "ROWS.jsonl", [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(12)])
    write(home / "mt_bench.jsonl", [{"question_id": 1, "category": "writing", "turns": ["one", "two"]}])
    write(home / "rewardbench.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "subset": "math-prm", "id": 1}])
    outputs = [{"instruction": f"task {n}", "output": "brass", "generator": "base"} for n in range(2)]
    (home / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(outputs))
    published = [
        {"instruction": f"task {n}", "output_1": "brass", "output_2": "gold", "preference": 1 + n / 3}
        | {"generator_1": "base", "generator_2": "other"}
        for n in range(4)
    ]
    (home / "annotations.json").write_text(json.dumps(published))
    return home


@pytest.fixture
def here(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the stage, as the working directory."""
    home = tmp_path / "here"
    shutil.copytree(stage, home)
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    yield home
    config.use([])
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def verdict(request: Request) -> str:
    """A judge's answer: of two the first, else 5 of 10."""
    return "[[A]]" if any("[[A]]" in turn["content"] for turn in request["messages"]) else "[[5]]"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forks: Forks) -> None:
    """Jobs of a sweep are forked, and `align verify` examines in this process, after two steps."""

    def examined(given: list[Subject], dirs: list[str], **_: Any) -> Iterator[tuple[Subject, list[Check]]]:
        for number, subject in enumerate(given):
            yield subject, examine.examine(subject, dirs, tmp_path / "verify" / str(number))

    monkeypatch.setattr(sweep, "_run", lambda given, config_dirs: (forks.run("train", *given), False))
    monkeypatch.setattr(examine, "examine_all", examined)


def lengthened(command: str) -> list[str]:
    """The words of a command, and what makes it short."""
    more = [word for pattern, words in SHORT.items() if re.match(pattern, command) for word in words.split()]
    return [*shlex.split(command), *more]


def run(command: str) -> None:
    """Run or plan a command of align's, without its first word."""
    words = shlex.split(command)
    assert words[0] in COMMANDS
    if not any(re.match(pattern, command) for pattern in PLANNED):
        assert align(*lengthened(command)) == exits.DONE, command
    elif words[0] == "evaluate":
        assert evaluate.plan(*evaluate.read(words[2:]))
    elif words[0] == "reproduce":
        asked = reproduce.parse(words[1:])
        assert "--list" in asked.flags or recipe.find(str(asked.name))
    else:
        first = [word.partition(",")[0] if "-m" in words else word for word in words[1:] if word != "-m"]
        assert align("plan", *first) in (exits.DONE, exits.FAILED)  # whether it fits into this machine


@pytest.mark.usefixtures("quick", "no_judge")
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_commands_of_a_chapter_run(chapter: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = CHAPTERS[chapter]
    if not any("run.dir=rater" in command for command in commands):
        shutil.copytree("REWARD_RUN", "rater")
    with scripted(verdict) as server:
        for command in commands:
            if command.startswith("export ALIGN_JUDGE_URL"):
                for name, value in (word.split("=", 1) for word in command.split()[1:]):
                    monkeypatch.setenv(name, server.url if name == judges.URLS[0] else value)
            elif command.startswith("printf "):
                said, _, asked = command.partition(" | align ")
                text = shlex.split(said)[1].encode().decode("unicode_escape")
                monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
                run(asked)
            elif command.startswith("align "):
                run(command.removeprefix("align "))
            else:
                assert command.startswith(ELSEWHERE), command
