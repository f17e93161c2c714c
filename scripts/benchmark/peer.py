"""TRL's side, a process of its own: `DPOTrainer` on the groups of a file, as shipped, tuned, or with K responses.

As shipped, everything that speed depends on is the default of `DPOConfig` and `Trainer`: batches of 8 groups (fewer
where a step has fewer), padded to their longest sequence; gradient checkpointing; bf16 autocast over fp32 weights; a
second model as the reference, evaluated in every step; fused AdamW without weight decay, which is Trainer's default.

Tuned, the job says: micro-batch, bf16 weights or autocast over fp32 weights, no checkpointing, reference precomputed.

What differs from an ordinary use of TRL in all cases: the groups come in a fixed order (Trainer's `sequential`
sampling), nothing is saved, and a callback says when a step has ended.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from benchmark import groups, worker
from benchmark.kwise import KwiseCollator, KwiseTrainer
from benchmark.worker import say


class Steps(TrainerCallback):
    """Says that a step has ended, and keeps the first step's gradient where a file for it is named."""

    def __init__(self, gradient: Path | None) -> None:
        self.gradient = gradient

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gradient is None or state.global_step > 0:
            return
        found = {name: weight.grad.clone() for name, weight in kwargs["model"].named_parameters()}
        save_file(found, self.gradient)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say(f"step {state.global_step}/{state.max_steps}")


class Recorder:
    """Trainer's losses, one for each micro-batch, read off where it computes them."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.losses: list[float] = []
        compute = trainer.compute_loss

        def recorded(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            self.losses.append(float(loss.detach()))
            return loss

        trainer.compute_loss = recorded  # pyright: ignore[reportAttributeAccessIssue]


def timed_reference(trainer: type[DPOTrainer], kept: Path | None) -> type[DPOTrainer]:
    """The same trainer, saying when its pass over the reference begins and ends.

    Args:
        kept: the pass's columns, of an earlier process on the same rows, order and weights; written where absent. The
            pass does not count, so a benchmark's rounds need it once.
    """

    class Timed(trainer):  # pyright: ignore[reportGeneralTypeIssues]
        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            if kept is not None and kept.is_file():
                for name, values in json.loads(kept.read_text(encoding="utf-8")).items():
                    dataset = dataset.add_column(name, values)
                return dataset
            say("reference begins")
            found = super()._precompute_ref_logps(dataset, *args, **kwargs)
            say("reference ends")
            if kept is not None:
                new = [name for name in found.column_names if name not in dataset.column_names]
                kept.write_text(json.dumps({name: list(found[name]) for name in new}), encoding="utf-8")
            return found

    return Timed


def arguments(job: dict[str, Any], folder: Path) -> DPOConfig:
    """What the job asks for; what it leaves out is TRL's default."""
    shipped: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["groups"] // job["micro_batch"],
        "max_steps": job["steps"],
        "learning_rate": job["lr"],
        "beta": job["beta"],
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "use_cpu": job["cpu"],
    }
    if job["shipped"]:
        return DPOConfig(**shipped)
    return DPOConfig(
        **shipped,
        max_length=None,
        gradient_checkpointing=job["checkpointing"],
        precompute_ref_log_probs=True,
        bf16=job["autocast"],
        model_init_kwargs={"dtype": job["weights"]},
    )


def main() -> None:
    job = worker.read_job()
    torch.set_float32_matmul_precision(job["fp32_products"])
    folder = Path(job["folder"])
    data = load_dataset("json", data_files=job["rows"], split="train", cache_dir=os.environ["HF_DATASETS_CACHE"])
    data = data.select(job["order"])
    kind: type[DPOTrainer] = DPOTrainer if job["responses"] == 2 else KwiseTrainer
    options: dict[str, Any] = {}
    if job["responses"] != 2:
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        options = {"data_collator": KwiseCollator(pad=tokenizer.pad_token_id)}
        KwiseTrainer.alpha = job["alpha"]
    gradient = Path(job["gradient"]) if job["gradient"] else None
    kept = Path(job["reference"]) if job["reference"] else None
    reused = kept is not None and kept.is_file()
    trainer = timed_reference(kind, kept)(
        model=job["model"],
        args=arguments(job, folder),
        train_dataset=data,
        callbacks=[Steps(gradient)],
        **options,
    )
    recorder = Recorder(trainer) if gradient else None
    say("training begins")
    trainer.train()
    assert trainer.model is not None
    weights = {str(weight.dtype) for weight in trainer.model.parameters()}
    args = trainer.args
    worker.write_result(
        {
            "tokens": groups.digest(_token_ids(trainer.train_dataset)),
            "reference_reused": reused,
            "losses": recorder.losses if recorder else None,
            "weights": sorted(weights),
            "moved": _moved(trainer.model, Path(job["model"])),
            "used": {
                name: str(vars(args)[name])
                for name in (
                    "per_device_train_batch_size",
                    "gradient_accumulation_steps",
                    "gradient_checkpointing",
                    "bf16",
                    "precompute_ref_log_probs",
                    "max_length",
                    "optim",
                    "weight_decay",
                    "max_grad_norm",
                    "adam_beta1",
                    "adam_beta2",
                    "adam_epsilon",
                    "lr_scheduler_type",
                )
            },
        }
    )


def _moved(model: Any, start: Path) -> float:
    """The share of weights that training has changed."""
    before = load_file(start / "model.safetensors")
    now = {name: weight for name, weight in model.named_parameters() if name in before}
    changed = sum(int((weight != before[name].to(weight.dtype)).sum()) for name, weight in now.items())
    return changed / sum(weight.numel() for weight in now.values())


def _token_ids(rows: Any) -> Any:
    """Prompts and responses as this side tokenised them, in the order of training."""
    for row in rows:
        if "responses_ids" in row:
            yield row["prompt_ids"], row["responses_ids"]
        else:
            yield row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]


if __name__ == "__main__":
    main()
