"""What the README's commands name: models, runs, rows and benchmarks in small, and stand-ins for programs of a cluster.

Names of the hub are folders here: what loads from the hub takes a folder of that name in the working directory first.
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import small_runs
from small_runs import ROWS, align

from align_cli import exits

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

# of the embedded world and of a run, in small
WORLD = (
    "world.demonstrations=200 world.sft_steps=20 world.hidden=32 world.layers=1 world.prompts=24 world.held_out=8 "
    "data.held_out=6"
)
TRAINED = "train.steps=1 train.prompts=4 eval.groups=2 eval.samples=2 eval.prompts=2 launch.accelerator=cpu track=none"


def build(home: Path) -> None:
    """Fill an empty folder with all that is named."""
    models(home)
    rows(home)
    benchmarks(home)
    tasks(home)
    package(home / "mine")
    programs(home)


def models(home: Path) -> None:
    """Models of random weights, and finished runs."""
    model = small_runs.build_reader(home / "FOLDER", seed=0)
    for name in ("Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct"):
        shutil.copytree(model, home / "Qwen" / name)
    small_runs.build_reader(home / "HuggingFaceH4" / "mistral-7b-sft-beta", seed=0, family="mistral")
    given = ["model=hf", f"model.path={model}", "data=toy", "world=addition", *WORLD.split(), *TRAINED.split()]
    assert align("train", *given, f"run.dir={home / 'RUN'}", "algo=nca") == exits.DONE
    assert align("train", *given, f"run.dir={home / 'REWARD_RUN'}", "algo=bradley_terry") == exits.DONE
    for name in ("OTHER_RUN", "runs/before", "sweeps/tiny-toy-1a2b3c4d/0", "sweeps/tiny-toy-1a2b3c4d/1"):
        shutil.copytree(home / "RUN", home / name)
    shutil.copytree(home / "REWARD_RUN" / "model", home / "REWARD_MODEL")


def rows(home: Path) -> None:
    """Rows to train on, to sample from and to judge."""
    (home / "ROWS" / "helpful-base").mkdir(parents=True)
    for split in ("train", "test"):
        shutil.copy(ROWS / "hh.jsonl", home / "ROWS" / "helpful-base" / f"{split}.jsonl")
    small_runs.write_few_rows(home / "ROWS")
    (home / "openbmb" / "UltraFeedback").mkdir(parents=True)
    shutil.copy(home / "ROWS" / "ultrafeedback.jsonl", home / "openbmb" / "UltraFeedback" / "train.jsonl")
    write(home / "prompts.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}]}, {"prompt": "Why?"}])
    write(home / "rows.jsonl", [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(8)])
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


ARITHMETIC = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(12)]
FIELDS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory")
PROBLEM = {"problem": "1 + 1?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."}
SVAMP = {"ID": "chal-1", "Body": "There are 8.", "Question": "Of 3 more?", "Answer": "11", "Type": "Addition"}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def total(x: list) -> int:\n    """The sum."""\n',
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
}
MBPP = {"task_id": 2, "text": "Add.", "code": "def add(a, b): ...", "test_list": ["assert add(1, 2) == 3"]}
CHOICE = {"id": "1", "question": "Hot?", "choices": {"text": ["Ice", "Fire"], "label": ["A", "B"]}, "answerKey": "B"}


def benchmarks(home: Path) -> None:
    """Two rows of each benchmark that the README asks the hub for, as its repository there has them."""
    write(home / "ROWS.jsonl", ARITHMETIC)
    published(home / "openai" / "gsm8k", {"main": {"train": ARITHMETIC, "test": ARITHMETIC}})
    fields = (*FIELDS, "prealgebra", "precalculus")
    published(home / "EleutherAI" / "hendrycks_math", {name: {"test": [PROBLEM] * 2} for name in fields})
    published(home / "ChilleD" / "SVAMP", {"default": {"test": [SVAMP] * 2}})
    published(home / "openai" / "openai_humaneval", {"default": {"test": [HUMANEVAL] * 2}})
    published(home / "google-research-datasets" / "mbpp", {"full": {"test": [MBPP] * 2}})
    splits = {name: [CHOICE] * 2 for name in ("train", "validation", "test")}
    published(home / "allenai" / "ai2_arc", {"ARC-Easy": splits})


def published(folder: Path, subsets: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """A dataset in the form of the hub: its README says which file is which split of which subset."""
    folder.mkdir(parents=True)
    head = ["---", "configs:"]
    for subset, splits in subsets.items():
        head += [f"- config_name: {subset}", "  data_files:"]
        for split, lines in splits.items():
            write(folder / f"{subset}-{split}.jsonl", lines)
            head += [f"  - split: {split}", f"    path: {subset}-{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*head, "---", ""]))


TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"], do_sample: false, max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
# a Python in whose lm-eval the thousands of task files that come with it are not looked at, which takes ten seconds
WITH_LM_EVAL = f"""#!{sys.executable}
import functools, runpy, sys
from lm_eval import tasks
tasks.TaskManager.__init__ = functools.partialmethod(tasks.TaskManager.__init__, include_defaults=False)
assert sys.argv[1] == "-m"
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def tasks(home: Path) -> None:
    """A task file for lm-eval, and an environment that has lm-eval."""
    (home / "FOLDER" / "mine.yaml").write_text(TASK)
    program(home / "OTHER_VENV" / "bin" / "python", WITH_LM_EVAL)


def package(home: Path) -> None:
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


SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames NODES" ] && printf '127.0.0.1\\n127.0.0.2\\n'
"""
# every task on this machine, and the worst exit code
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
words, given = sys.argv[1:], {{}}
while words[0].startswith("--"):
    name, equals, value = words.pop(0).partition("=")
    given[name] = value if equals else words.pop(0)
assert set(given) == {{"--kill-on-bad-exit", "--nodes", "--ntasks-per-node", "--gpus-per-node"}}, given
tasks = int(given["--ntasks-per-node"])
everywhere = int(given["--nodes"]) * tasks
ranks = []
for rank in range(everywhere):
    told = {{"PROCID": rank, "LOCALID": rank % tasks, "NTASKS": everywhere, "NTASKS_PER_NODE": tasks}}
    told = {{f"SLURM_{{name}}": str(value) for name, value in told.items()}}
    ranks.append(subprocess.Popen(words, env={{**os.environ, **told}}))
sys.exit(max(rank.wait() for rank in ranks))
"""


def programs(home: Path) -> None:
    """`bin`, to come first in PATH: this Python and its torchrun, and a cluster of this machine alone."""
    program(home / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program(home / "bin" / "torchrun", f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    program(home / "bin" / "scontrol", SCONTROL)
    program(home / "bin" / "srun", SRUN)


def program(path: Path, text: str) -> None:
    """Something to execute."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in lines), encoding="utf-8")
