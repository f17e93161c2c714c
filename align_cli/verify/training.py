"""The ordinary loop on the enumerable world: what `align train` does, with data, model and settings of a problem."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from align_cli import config, reading
from align_cli import run as running
from align_cli.terminal import silent
from align_cli.verify.problems import Problem, write_rows
from align_cli.verify.world import World

# Full batches, so that nothing but the number of steps is between a run and its optimum; of samples, many.
SETTINGS = {
    "model": "hf",
    "data": "file",
    "data.template": "text",
    "data.held_out": 0,
    "engine": "torch",
    "engine.precision": "fp32",
    "launch.accelerator": "cpu",
    "launch.devices": 1,
    "train.warmup_ratio": 0,
    "eval.groups": 0,
    "track": "none",
}
OFFLINE = {"train.steps": 200, "train.lr": 0.15, "optimizer.betas": "[0.9,0.99]"}
ONLINE = {"train.steps": 100, "train.lr": 0.1, "source.samples": 256, "source.max_new_tokens": 3}


def train(world: World, problem: Problem, folder: Path, config_dirs: list[str]) -> Tensor:
    """Train and measure: (P, S) log-probabilities of all responses, or a reward model's scores of them.

    Args:
        folder: which is made; the run is left in it.
    """
    folder.mkdir(parents=True)
    write_rows(folder / "rows.jsonl", problem.rows)
    settings: Mapping[str, object] = {
        **SETTINGS,
        **(ONLINE if problem.kind == "samples" else OFFLINE),
        "train.prompts": len(problem.rows),
        "model.path": config.quoted(str(world.folder)),
        "data.path": config.quoted(str(folder / "rows.jsonl")),
        "run.dir": config.quoted(str(folder / "run")),
    }
    steps = settings["train.steps"]
    given = [f"{key}={value}" for key, value in {**settings, "checkpoint.every": steps}.items()]
    tree = config.compose("train", [*problem.overrides, *given], config_dirs)
    (folder / "run").mkdir()
    with contextlib.redirect_stderr(io.StringIO()):
        running.run(running.prepare(reading.read(tree), silent), folder / "run")
    model = folder / "run" / "model"
    return world.scores(model) if problem.own == "scores" else world.logs(model)
