"""`align export`: a run's model as an ordinary Hugging Face folder, with adapters merged, read back and compared."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cli import exits, rundir, terminal
from align_cli.commands.arguments import Parser
from align_cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # of a probe's log-probabilities in nats or of its score, for fp32 arithmetic on the same weights


def main(argv: list[str]) -> int:
    """`export RUN DEST`; returns the exit code."""
    parser = Parser(prog="align export", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("dest", type=Path, help="a new folder")
    given = parser.parse_args(argv)
    config = rundir.read_config(given.run)
    source = given.run / "model"
    if not source.is_dir():
        raise UserError(f"{source}: the run has not finished; align train with the same configuration resumes it.")
    if given.dest.exists():
        raise UserError(f"{given.dest} exists; choose a new folder.")
    summary = rundir.read_summary(given.run) or {}
    try:
        export(source, given.dest)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: the model cannot be read or written: {' '.join(str(error).split())}") from error
    (given.dest / "README.md").write_text(card(config, summary), encoding="utf-8")
    terminal.result(f"{given.dest}: safetensors, tokenizer and model card, read back and equal to {source}")
    return exits.DONE


def export(source: Path, dest: Path) -> None:
    """Merge adapters, save, read back, compare; `dest` is there whole or not at all.

    Raises:
        UserError: adapters that are not safetensors.
        RuntimeError: what was read back does not compute the same.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from align_cli.models.scalar import is_reward_model

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # a reward model's head is in its adapters' file
    if (source / "adapter_config.json").is_file():
        before, network, probe = _merged(source)
    else:
        kind = _kind(scores=is_reward_model(AutoConfig.from_pretrained(source, trust_remote_code=False)))
        network = kind.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        probe = torch.arange(4, 20)[None] % int(network.config.vocab_size)
        before = _figures(network.float(), probe)
        network = kind.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    partial = dest.with_name(f"{dest.name}.{os.getpid()}.tmp")
    try:
        network.save_pretrained(partial, safe_serialization=True)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(partial)
        again = type(network).from_pretrained(partial, use_safetensors=True, trust_remote_code=False).float()
        difference = float((_figures(again, probe) - before).abs().max())
        if not difference <= TOLERANCE:  # NaN is no agreement either
            unit = " nats" if before.ndim == 3 else ""
            raise RuntimeError(f"what was written differs by {difference:.3g}{unit} from {source}; it is removed.")
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _merged(source: Path) -> tuple["Tensor", "PreTrainedModel", "Tensor"]:
    """What the model says of a probe before merging, the merged model in fp32, and the probe."""
    import torch
    from peft import PeftConfig, PeftModel

    from align_cli.models.adapters import quiet_peft, refuse_other_formats

    refuse_other_formats(source)
    told = PeftConfig.from_pretrained(str(source))
    settings = {"num_labels": 1} if told.task_type == "SEQ_CLS" else {}
    base = _kind(scores=bool(settings)).from_pretrained(
        str(told.base_model_name_or_path),
        revision=told.revision,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        **settings,
    )
    with quiet_peft():
        wrapped = PeftModel.from_pretrained(base, str(source))
    probe = torch.arange(4, 20)[None] % int(base.config.vocab_size)
    before = _figures(wrapped, probe)
    return before, wrapped.merge_and_unload(), probe  # pyright: ignore[reportCallIssue]  it is a LoRA model


def _kind(*, scores: bool) -> Any:
    """The class of transformers that loads a reward model, or a language model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if scores else AutoModelForCausalLM


def _figures(network: "Module", probe: "Tensor") -> "Tensor":
    """Log-probabilities (1, T, V) of a language model; the score (1, 1) of a reward model."""
    import torch

    with torch.no_grad():
        logits = network(probe).logits
        return logits.log_softmax(-1) if logits.ndim == 3 else logits


def card(config: dict, summary: dict) -> str:
    """A model card: what it started from, how it was trained, what was measured."""
    flat = rundir.flatten(config)
    algorithm = ", ".join(f"{k.removeprefix('algo.')}={v}" for k, v in flat.items() if k.startswith("algo."))
    rows = [f"| {name} | {value:.4g} |" for name, value in summary.items() if isinstance(value, float)]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [alignment, align]",
            f"base_model: {flat['model.path']}",
            "---",
            "",
            f"# {flat['model.name']} aligned with {flat['algo.name']}",
            "",
            f"Started from `{flat['model.path']}`, trained on `{flat['data.path']}` ({flat['data.name']}) with align:",
            f"{algorithm}; learning rate {flat['train.lr']}, {flat['train.prompts']} prompts a step.",
            "",
            "| figure | value |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )
