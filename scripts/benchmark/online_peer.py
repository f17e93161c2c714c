"""TRL's side of online training, a process of its own: `RLOOTrainer` or `GRPOTrainer` on the prompts of a file.

As a user would tune it on a CPU: all samples of a step are generated together by `generate`, so many of them are
trained on at a time as is fastest; no gradient checkpointing, no logging, no workers for the data. What the job does
not name is TRL's default; GRPO's loss is the paper's, as align's is. A response is rated by align's own scorer.
"""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from align_cli import scorers
from benchmark import worker
from benchmark.peer import Steps
from benchmark.worker import say


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Of `RLOOConfig` and `GRPOConfig` alike."""
    return {
        "output_dir": job["folder"],
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["groups"] * job["samples"] // job["micro_batch"],
        "num_generations": job["samples"],
        "max_completion_length": job["new_tokens"],
        "max_steps": job["steps"],
        "num_iterations": 1,
        "learning_rate": job["lr"],
        "beta": job["beta"],
        "bf16": job["precision"] == "bf16",
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "shuffle_dataset": False,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }


def main() -> None:
    job = worker.read_job()
    rows = load_dataset("json", data_files=job["rows"], split="train", cache_dir=os.environ["HF_DATASETS_CACHE"])
    rows = rows.select_columns(["prompt"]).select(job["order"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")

    def rate(prompts: list[str], completions: list[str], **others: Any) -> list[float]:
        each = zip(prompts, completions, strict=True)
        return [scorers.matches(prompt, text, pattern=job["pattern"]) for prompt, text in each]

    common: dict[str, Any] = {
        "model": job["model"],
        "reward_funcs": rate,
        "train_dataset": rows,
        "processing_class": tokenizer,
        "callbacks": [Steps(None)],
    }
    if job["algorithm"] == "rloo":
        trainer = RLOOTrainer(args=RLOOConfig(**arguments(job)), **common)
    else:
        trainer = GRPOTrainer(args=GRPOConfig(**arguments(job), loss_type="grpo"), **common)
    say("training begins")
    trainer.train()
    assert trainer.model is not None
    worker.write_result(
        {
            "response_tokens": trainer.state.log_history[-1]["completions/mean_length"],
            "weights": sorted({str(weight.dtype) for weight in trainer.model.parameters()}),
            "model": Path(job["model"]).name,
            "torch_threads": torch.get_num_threads(),
        }
    )


if __name__ == "__main__":
    main()
