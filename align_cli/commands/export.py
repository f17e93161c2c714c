"""`align export`: a run's model as an ordinary Hugging Face folder, with adapters merged, read back and compared."""

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from align_cli import exits, rundir, terminal
from align_cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # nats of a probe's log-probabilities, for fp32 arithmetic on the same weights


def main(argv: list[str]) -> int:
    """`export RUN DEST`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="align export", description=__doc__)
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
        UserError: adapters that are no safetensors.
        RuntimeError: what was read back does not compute the same.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if (source / "adapter_config.json").is_file():
        before, network, probe = _merged(source)
    else:
        network = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        probe = torch.arange(4, 20)[None] % int(network.config.vocab_size)
        before = _logprobs(network.float(), probe)
        network = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    partial = dest.with_name(f"{dest.name}.{os.getpid()}.tmp")
    try:
        network.save_pretrained(partial, safe_serialization=True)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(partial)
        again = AutoModelForCausalLM.from_pretrained(partial, use_safetensors=True, trust_remote_code=False).float()
        difference = float((_logprobs(again, probe) - before).abs().max())
        if not difference <= TOLERANCE:  # NaN is no agreement either
            raise RuntimeError(f"what was written differs by {difference:.3g} nats from {source}; it is removed.")
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _merged(source: Path) -> tuple["Tensor", "PreTrainedModel", "Tensor"]:
    """Log-probabilities of a probe before merging, the merged model in fp32, and the probe."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    from align_cli.models.adapters import quiet_peft

    if not (source / "adapter_model.safetensors").is_file():
        raise UserError(f"{source}: it has no adapter_model.safetensors; adapters in safetensors would be right.")
    start = str(PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
    base = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    with quiet_peft():
        wrapped = PeftModel.from_pretrained(base, str(source))
    probe = torch.arange(4, 20)[None] % int(base.config.vocab_size)
    before = _logprobs(wrapped, probe)
    return before, wrapped.merge_and_unload(), probe  # pyright: ignore[reportCallIssue]  it is a LoRA model


def _logprobs(network: "Module", probe: "Tensor") -> "Tensor":
    import torch

    with torch.no_grad():
        return network(probe).logits.log_softmax(-1)


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
