"""`align export`: a run's model as an ordinary Hugging Face folder, with adapters merged, read back and compared."""

import argparse
from pathlib import Path

from align_cli import exits, rundir, terminal
from align_cli.errors import UserError

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
    """Merge adapters, save, read back, compare.

    Raises:
        RuntimeError: what was read back does not compute the same.
    """
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapted = (source / "adapter_config.json").is_file()
    if adapted:
        wrapped = AutoPeftModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        assert isinstance(wrapped, PeftModel)
        probe = torch.arange(4, 20)[None] % int(wrapped.config.vocab_size)
        before = _logprobs(wrapped, probe)
        network = wrapped.merge_and_unload()
    else:
        network = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        probe = torch.arange(4, 20)[None] % int(network.config.vocab_size)
        before = _logprobs(network.float(), probe)
        network = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    network.save_pretrained(dest, safe_serialization=True)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(dest)
    again = AutoModelForCausalLM.from_pretrained(dest, use_safetensors=True, trust_remote_code=False).float()
    difference = float((_logprobs(again, probe) - before).abs().max())
    if difference > TOLERANCE:
        raise RuntimeError(f"{dest} read back differs by {difference:.3g} nats from {source}; it is not to be used.")


def _logprobs(network, probe):  # type: ignore[no-untyped-def]
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
