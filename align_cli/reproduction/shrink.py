"""A recipe in small: the same runs with random models of the same families, a few rows and a few steps, on one CPU.

What it measures means nothing. It shows that every part of a recipe for many GPUs fits together, before they are hired.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from align_cli import config
from align_cli.errors import UserError
from align_cli.experiment import Experiment
from align_cli.models import tiny
from align_cli.raters import FromModel
from align_cli.reproduction.recipe import Recipe, Run, merged
from align_cli.sources import FromPolicy

SETTINGS = (
    "train.steps=2",
    "train.prompts=2",
    "eval.groups=2",
    "eval.samples=2",
    "eval.prompts=0",
    "engine=torch",
    "engine.precision=fp32",
    "launch.devices=1",
    "launch.accelerator=cpu",
    "track=none",
)
DATA = ("data.revision=null", "data.subset=null", "data.held_out_split=null", "data.held_out=2", "data.limit=null")
SAMPLED = ("source.samples=2", "source.max_new_tokens=4")
FITTED = "target.samples=64"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
UNKNOWN = {"model_type": "llama", **dict.fromkeys(SIZES, 1)}  # for a model whose YAML does not tell its family


def shrunken(recipe: Recipe, scale: str, experiments: Mapping[str, Experiment], rows: Path, folder: Path) -> Recipe:
    """The recipe with that scale in small; models are written to `folder`.

    Args:
        experiments: of its runs.
        rows: a folder with a few rows of each dataset, as <name>.jsonl.

    Raises:
        UserError: the rows of a dataset are not there.
    """
    chosen = recipe.scales[scale]
    missing = sorted({_rows(rows, each) for each in experiments.values()} - set(rows.glob("*.jsonl")))
    if missing:
        raise UserError(f"shrink={rows}: put {', '.join(path.name for path in missing)} there.")
    runs = tuple(_small(run, experiments[run.name], rows, folder) for run in chosen.runs)
    small = replace(chosen, runs=runs, evaluate=())
    return replace(recipe, scales={**recipe.scales, scale: small})


def _rows(rows: Path, experiment: Experiment) -> Path:
    return rows / f"{experiment.data.name}.jsonl"


def _small(run: Run, experiment: Experiment, rows: Path, folder: Path) -> Run:
    own: dict[str, str] = {}
    for override in run.overrides:
        key, _, own[key] = override.lstrip("+").partition("=")
    settings = [*SETTINGS, *DATA, f"data.path={_quoted(_rows(rows, experiment))}"]
    if "<" not in own.get("model.path", ""):  # and does not start from another run
        settings.append(f"model.path={_quoted(_built(experiment, folder, scores=False))}")
    if experiment.adapter.bits is not None:  # which needs a GPU
        settings.append("adapter=lora")
    if isinstance(experiment.source, FromPolicy):
        settings += SAMPLED
    if experiment.moments is not None:
        settings.append(FITTED)
    if isinstance(experiment.scorer, FromModel) and "<" not in own.get("scorer.path", ""):
        settings.append(f"scorer.path={_quoted(_built(experiment, folder, scores=True))}")
    return replace(run, overrides=tuple(merged([*run.overrides, *settings])))


def _built(experiment: Experiment, folder: Path, *, scores: bool) -> Path:
    """A random model of the experiment's family, made where it is not there yet."""
    architecture: Mapping[str, Any] = experiment.model.architecture or UNKNOWN
    transformers_logging.disable_progress_bar()
    path = folder / f"{architecture['model_type']}{'-scores' if scores else ''}"
    if not (path / "config.json").is_file():
        tiny.build_like(path, architecture, scores=scores, seed=int(scores))
    return path


def _quoted(path: Path) -> str:
    return config.quoted(str(path))
