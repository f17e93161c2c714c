"""What a user of TRL has to write to train on K responses of a prompt: TRL has pairs alone.

The layout is that of the NCA authors' public trainer: a prompt with K responses becomes K padded rows of a batch, each
with its own copy of the prompt, and all rows of a micro-batch have the length of its longest. The rest is TRL's own:
its loading, its chunked head (`add_fused_lm_head`), its loop, its optimizer, its precomputed reference in the dataset.
The loss on top is K-wise NCA (arXiv:2402.05369) of the rows' summed log-probabilities.

It does less than TRL's pairwise trainer: the statistics over the vocabulary that TRL logs beside its losses (entropy,
mean logit, top-1 accuracy) are not computed, and nothing is gathered for logging. So it is a lower bound of the cost.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import add_fused_lm_head


@dataclass
class KwiseCollator:
    """Groups of one K to (B K, T) padded rows, group after group."""

    pad: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [(group["prompt_ids"], response) for group in examples for response in group["responses_ids"]]
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.full((len(rows), longest), self.pad)
        attention = torch.zeros(len(rows), longest, dtype=torch.long)
        completion = torch.zeros(len(rows), longest, dtype=torch.long)
        for place, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            ids[place, :end] = torch.tensor(prompt + response)
            attention[place, :end] = 1
            completion[place, len(prompt) : end] = 1
        batch = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
        batch["rewards"] = torch.tensor([group["rewards"] for group in examples])
        if "reference" in examples[0]:
            batch["reference"] = torch.tensor([group["reference"] for group in examples])
        return batch


class KwiseTrainer(DPOTrainer):
    """TRL's trainer with K responses for each prompt and the loss of NCA."""

    alpha: ClassVar[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # without the statistics that only TRL's own metrics ask for
        add_fused_lm_head(self.model, outputs=("log_probs",))  # pyright: ignore[reportArgumentType]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        end = processing_class.eos_token

        def tokenised(row: dict[str, Any]) -> dict[str, Any]:
            prompt = processing_class(row["prompt"])["input_ids"]
            whole = [processing_class(row["prompt"] + text + end)["input_ids"] for text in row["completions"]]
            return {"prompt_ids": prompt, "responses_ids": [ids[len(prompt) :] for ids in whole]}

        return dataset.map(tokenised)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "responses_ids", "rewards", "reference"]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        model = self.ref_model or self.model
        found: list[list[float]] = []
        for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator):  # pyright: ignore
            with torch.no_grad(), self.accelerator.autocast():
                found += self._logprobs(model, batch).float().tolist()
        return dataset.add_column("reference", found)  # pyright: ignore[reportCallIssue]

    def _logprobs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """(B, K) log-probabilities of the responses."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        told = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
        return told.log_probs.sum(1).view(batch["rewards"].shape)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        ratio = self.beta * (self._logprobs(model, inputs) - inputs["reference"])
        target = (inputs["rewards"] / self.alpha).softmax(-1)
        return -(target * logsigmoid(ratio) + logsigmoid(-ratio) / ratio.shape[1]).sum(-1).mean()
