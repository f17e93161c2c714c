"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685), through peft."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from align_cli.errors import UserError, first_line
from align_cli.paths import whole
from align_cli.ranges import Count, Positive

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The `adapter` section of the configuration; `rank` is null where all weights are trained."""

    name: str
    rank: Count | None
    scale: Positive | None
    targets: list[str] | Literal["all-linear"] | None
    bits: Literal[4] | None


def attach(
    network: PreTrainedModel, adapter: Adapter, *, seed: int, scores: bool = False, commit: str | None = None
) -> PreTrainedModel | PeftModel:
    """The network with fresh adapters, which change nothing until the first update; or as it is without.

    Args:
        scores: it is a reward model, whose head is trained and saved whole beside the adapters.
        commit: of the hub, whose weights the network has; what is saved names it.
    """
    if adapter.rank is None:
        return network
    # Every rank must draw the same adapter, which is made on the CPU whatever GPUs there are.
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(
                network,
                LoraConfig(
                    r=adapter.rank,
                    lora_alpha=adapter.scale,  # pyright: ignore[reportArgumentType]  a float works as well
                    lora_dropout=0.0,
                    target_modules=adapter.targets,
                    bias="none",
                    task_type="SEQ_CLS" if scores else "CAUSAL_LM",  # the first has peft train and save `score`
                ),
                autocast_adapter_dtype=False,
                revision=commit,
            )
        except ValueError as error:
            raise UserError(f"adapter.targets={adapter.targets}: {first_line(error)}") from error
    for told in wrapped.peft_config.values():  # what is saved has to mean the same from anywhere
        told.base_model_name_or_path = whole(told.base_model_name_or_path or "")
    return wrapped


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that peft reads a property of transformers by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


@contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """The network without its adapters: the reference of a LoRA run."""
    if not isinstance(network, PeftModel):
        raise UserError("reference=adapter needs an adapter; the run trains all weights. Use reference=cached.")
    with network.disable_adapter():
        yield


def refuse_other_formats(folder: Path) -> None:
    """Refuse adapters that are not in safetensors.

    Raises:
        UserError: the folder has none that are.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: it has no {WEIGHTS}; use adapters in safetensors.")


def worn(network: PreTrainedModel, folder: str, *, bits: int | None) -> PreTrainedModel | PeftModel:
    """The network that adapters were trained on, with those of a folder, as it was trained.

    They are merged into weights in fp32, which is faster. Sums in fewer bits would lose most of a small change.

    Args:
        bits: of the network's quantised weights.
    """
    with quiet_peft():
        wrapped = PeftModel.from_pretrained(network, folder, autocast_adapter_dtype=False)
    if bits is not None or network.dtype != torch.float32:
        return wrapped
    return wrapped.merge_and_unload()  # pyright: ignore[reportCallIssue, reportReturnType]  it is a LoRA model
