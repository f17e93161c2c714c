"""Every command of the README runs: its chapters are gone through in order, with small models and a few rows.

A command runs as it is written, in a folder where the names that it uses exist (`readme_stage`), without a network;
what makes it short is put behind it. Of five seeds two are run.
"""

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import readme_stage
import test_bench
import test_packaging
import yaml
from forks import HANGS, Forks
from readme_stage import README, TRAINED, WORLD
from scripted_judge import Request, scripted
from small_runs import align

from align_cli import config, exits, judges, rundir, sandbox, sweep
from align_cli.commands import COMMANDS
from align_cli.errors import UserError
from align_cli.reproduction import loading
from align_cli.reproduction.recipe import Recipe, merged
from align_cli.sandbox import Code
from align_cli.verify import examine
from align_cli.verify.checks import Check
from align_cli.verify.examine import Subject

ON_CPU = "accelerator=cpu precision=fp32 max_new_tokens=8"
EVALUATED = "generate.accelerator=cpu generate.precision=fp32 eval.limit=2"
# put behind every command of such a beginning, to make it short
SHORT = {
    r"(train|score)": TRAINED,
    r"train(?!.*model=)": WORLD,
    r"(train|score) .*(data=hh|model=mistral7b|model=qwen2_5_0_5b)": "data.held_out=1 train.prompts=2",
    r"train .*model=mistral7b launch.devices=8": "launch.devices=1",
    r"train .*launch=prepare": "launch.devices=2",
    r"train .*(source=rollout|algo=(ppo|fdpg))": "source.max_new_tokens=8",
    r"train .*algo=fdpg(?!.*exponential)": "scorer.pattern='1'",
    r"train .*target=exponential": "target.samples=64 target.features.hum.pattern='1'",
    r"evaluate (?!calibrate)": EVALUATED,
    r"evaluate .*eval=(?!rewardbench|harness)": "eval.max_new_tokens=8",
    r"evaluate .*code.run=true": "eval.limit=1",
    r"evaluate .*eval=mt_bench": "eval.path=mt_bench.jsonl",
    r"evaluate .*eval=rewardbench": "eval.path=rewardbench.jsonl",
    r"sample": f"{ON_CPU} cut=keep",  # of the few tokens none is the stop token
    r"chat": ON_CPU,
    r"verify$": "sft",  # tests/test_verify.py examines every algorithm
    r"reproduce nca/figure5$": "seeds=1 jobs=2",
    r"reproduce mine.yaml": "seeds=2 jobs=2",
    r"reproduce .*dir=DIR": "shrink=ROWS",
}

# no command of align's: the test that runs it
ELSEWHERE = {
    "scripts/quickstart": test_packaging.test_the_quickstart_installs_and_trains,
    "scripts/test": test_packaging.test_the_test_script_installs_and_runs_the_tests,
    "pip install -e . -c constraints.txt": test_packaging.test_the_readme_installs_the_checkout,
    "pip install -e '.[eval,scorers]' -c constraints.txt": test_packaging.test_the_readme_installs_the_checkout,
    "pip install -e '.[qlora]' -c constraints.txt": test_packaging.test_the_readme_installs_the_checkout,
    "scripts/bench": test_bench.test_the_script_shows_what_was_measured,
    "scripts/bench --quick": test_bench.test_the_script_shows_what_was_measured,
    "scripts/bench --readme": test_bench.test_the_script_shows_what_was_measured,
    "scripts/bench --quick --repeats 5 --name 30M --readme": test_bench.test_the_script_shows_what_was_measured,
    "scripts/bench --floor --name 30M": test_bench.test_the_script_shows_what_was_measured,
    "scripts/bench --only 135M --name 135M --readme": test_bench.test_the_script_shows_what_was_measured,
    "scripts/bench --parts": test_bench.test_the_script_shows_what_was_measured,
}


def chapters() -> dict[str, list[str]]:
    """The commands of each chapter, without what is said beside them; one of two chapters is the first one's."""
    text = re.sub(r"\\\n +", " ", README)
    found: dict[str, list[str]] = {}
    chapter = ""
    for line in text.splitlines():
        if line.startswith("#"):
            chapter = line.lstrip("# ")
        if re.match(r" {4}(align|printf|export|pip|torchrun|srun|scripts/)", line):
            command = re.split(r" {3,}|  +#", line.strip())[0].strip()
            if not any(command in commands for commands in found.values()):
                found.setdefault(chapter, []).append(command)
    return found


CHAPTERS = chapters()


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands name."""
    home = tmp_path_factory.mktemp("readme") / "stage"
    home.mkdir()
    readme_stage.build(home)
    return home


@pytest.fixture
def here(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the stage, as the working directory, without a network."""
    home = tmp_path / "here"
    shutil.copytree(stage, home)
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", list(sys.path))  # as a console script's, without the working directory
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", str(home / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "NODES")
    yield home
    config.use([])
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def verdict(request: Request) -> str:
    """A judge's answer: of two the first, else 5 of 10."""
    return "[[A]]" if any("[[A]]" in turn["content"] for turn in request["messages"]) else "[[5]]"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forks: Forks, forked: object) -> None:
    """Jobs of sweeps and recipes are forked, a recipe's are short, and `align verify` examines in this process."""

    def examined(given: list[Subject], dirs: list[str], **_: Any) -> Iterator[tuple[Subject, list[Check]]]:
        for number, subject in enumerate(given):
            yield subject, examine.examine(subject, dirs, tmp_path / "verify" / str(number))

    plain = loading.load
    monkeypatch.setattr(sweep, "_run", lambda given, config_dirs: (forks.run("train", *given), False))
    monkeypatch.setattr(loading, "load", lambda name: shortened(plain(name)))
    monkeypatch.setattr(examine, "examine_all", examined)


def shortened(loaded: Recipe) -> Recipe:
    """A recipe whose runs at scale tiny make one step in a small world."""
    tiny = loaded.scales["tiny"]
    more = [*WORLD.split(), *TRAINED.split()]
    runs = tuple(replace(run, overrides=tuple(merged([*run.overrides, *more]))) for run in tiny.runs)
    return replace(loaded, scales={**loaded.scales, "tiny": replace(tiny, runs=runs)})


def own(path: Path) -> None:
    """Make a copied recipe one's own, of a single run."""
    whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    for scale in whole["scales"].values():
        scale["runs"] = {"nca": scale["runs"]["nca"]}
    whole["expect"] = [claim for claim in whole["expect"] if claim["of"] == "nca" and "less" not in claim]
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")


def run(command: str, given_to: Callable[..., int] = align) -> None:
    """Run a command of align's, without its first word."""
    assert command.split()[0] in COMMANDS
    more = [word for pattern, words in SHORT.items() if re.match(pattern, command) for word in words.split()]
    command = command.replace("run.seed=0,1,2,3,4", "run.seed=0,1")
    assert given_to(*shlex.split(command), *more) == exits.DONE, command


def start(lines: Sequence[str]) -> None:
    """Run lines of a shell that start the prepared run on two nodes, here as two ranks of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = "\n".join(lines)
    for text, short in {"29500": port, "FIRST_NODE": "127.0.0.1", "-per-node 8": "-per-node 1"}.items():
        script = script.replace(text, short)
    # the line of torchrun is typed on each node, the one of srun once
    typed = dict.fromkeys(re.sub(r"--node-rank N\b", f"--node-rank {node}", script) for node in (0, 1))
    shells: list[subprocess.Popen[bytes]] = []
    for place, text in enumerate(typed):
        with open(f"{place}.log", "wb") as log:
            shells.append(subprocess.Popen(["bash", "-e", "-c", text], stdout=log, stderr=subprocess.STDOUT))
    try:
        for place, shell in enumerate(shells):
            assert shell.wait(timeout=HANGS) == exits.DONE, Path(f"{place}.log").read_text()[-3000:]
    finally:
        for shell in shells:
            shell.kill()
            shell.wait()
    assert rundir.read_summary(Path("RUN")) is not None
    env = json.loads(Path("RUN", rundir.ENV).read_text())
    assert env["ranks"] == 2 and len(env["before"]) == 1  # prepared, then run


def no_sandbox() -> str:
    """Why no program can be run on this machine; empty where one can."""
    try:
        sandbox.opened(Code(**config.compose("evaluate", [])["code"] | {"run": True}))
    except UserError as error:
        return str(error)
    return ""


def test_what_is_run_elsewhere_stands_in_the_readme() -> None:
    assert ELSEWHERE.keys() <= {command for commands in CHAPTERS.values() for command in commands}


@pytest.mark.usefixtures("quick", "no_judge")
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_commands_of_a_chapter_run(chapter: str, here: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [command for command in CHAPTERS[chapter] if command not in ELSEWHERE]
    if not any("run.dir=rater" in command for command in commands):
        shutil.copytree("REWARD_RUN", "rater")
    left_out, prepared = "", ""
    exported: list[str] = []
    with scripted(verdict) as server:
        for command in commands:
            if command.startswith("export ALIGN_JUDGE_URL"):
                for name, value in (word.split("=", 1) for word in command.split()[1:]):
                    monkeypatch.setenv(name, server.url if name == judges.URLS[0] else value)
            elif command.startswith("export "):
                exported.append(command)
            elif command.startswith(("torchrun ", "srun ")):
                start([*exported, command])
                shutil.rmtree("RUN")
                run(f"{prepared} engine=zero0")  # for the next one; zero3 takes seconds more
            elif command.startswith("printf "):
                said, _, asked = command.partition(" | align ")
                text = shlex.split(said)[1].encode().decode("unicode_escape")
                monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
                run(asked)
            elif "code.run=true" in command and no_sandbox():
                left_out = f"{command}: {no_sandbox()}"
            else:
                program, _, asked = command.partition(" ")
                assert program == "align", f"{command}: which test runs it?"
                if "launch=prepare" in asked:
                    prepared = asked
                    shutil.rmtree("RUN")
                # DeepSpeed's imports warn, which is an error in this process
                run(asked, forks.run if asked.startswith("score") else align)
                if asked.startswith("cp ") and asked.endswith(" mine.yaml"):
                    own(Path("mine.yaml"))
    if left_out:
        pytest.skip(left_out)
