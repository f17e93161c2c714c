"""A causal language model and the one function that gives log-probabilities of responses.

Policy, reference and evaluation all go through `measure`, so they cannot be computed differently.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from align_cli.data.batches import MicroBatch, flatten
from align_cli.data.store import Group
from align_cli.errors import UserError
from align_cli.logprobs import sum_by, token_logprobs
from align_cli.models import attention


@dataclass(frozen=True, kw_only=True)
class Model:
    """The `model` section of the configuration."""

    name: str
    path: str
    revision: str | None
    rows: Literal["auto", "shared", "padded"]
    architecture: dict[str, Any] | None


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, as it is saved beside the weights; a model that could not be loaded is refused now."""
    takes_flat_rows(read_architecture(model))
    _refuse_pickles(model.path)
    try:
        return AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={model.path}: no tokenizer can be read: {_first_line(error)} The folder needs the "
            "tokenizer's own files, such as tokenizer.json."
        ) from error


def load_model(model: Model, *, dtype: torch.dtype, bits: int | None) -> PreTrainedModel:
    """The model with its weights from safetensors, without dropout, on flat rows where it can take them."""
    config = read_architecture(model)
    _refuse_pickles(model.path)
    attention.register()
    implementation = attention.NAME if takes_flat_rows(config) and model.rows != "padded" else None
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its report of what is missing is ours to give, in one line
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.path,
            revision=model.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=implementation,
            quantization_config=_nf4(dtype) if bits == 4 else None,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.path={model.path}: the weights cannot be read: {_first_line(error)}") from error
    network, told = loaded
    if told["missing_keys"]:
        absent = sorted(told["missing_keys"])
        raise UserError(
            f"model.path={model.path}: its safetensors lack {len(absent)} weights of {type(network).__name__}, "
            f"{absent[0]} among them; they would start at random."
        )
    return silence_dropout(network)


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def takes_flat_rows(config: Any) -> bool:
    """Whether the architecture sends its attention through transformers' interface and keeps no other state.

    Convolutions and linear attention run over a row as one sequence, and chunked attention cuts at positions that
    `align_layout` does not know.
    """
    try:
        architecture: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise UserError(
            f"model.path: model type '{config.model_type}' is no causal language model of transformers."
        ) from error
    layers = config.to_dict().get("layer_types") or ()
    return bool(architecture._supports_attention_backend) and set(layers) <= {"full_attention", "sliding_attention"}


# Attributes of transformers' modules that make a forward pass random while training: dropout, and noise of routers.
_RANDOM = (
    "attention_dropout",
    "attn_dropout",
    "dropout",
    "jitter_noise",
    "input_jitter_noise",
    "router_jitter_noise",
)


def silence_dropout(network: PreTrainedModel) -> PreTrainedModel:
    """Set dropout and routers' noise to 0: policy and reference must be the same function until the first update."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _RANDOM:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return network


def recompute_activations(network: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again (gradient checkpointing)."""
    kept = {"use_reentrant": False}
    if hasattr(network, "activation_checkpointing_enable"):
        network.activation_checkpointing_enable(activation_checkpointing_kwargs=kept)
    else:  # its name in earlier versions of transformers
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)


def measure(network: nn.Module, batch: MicroBatch, *, flat: bool) -> dict[str, Tensor]:
    """Log-probabilities of the batch's responses.

    Args:
        network: a causal language model, bare or wrapped by an engine or by adapters; called once.
        batch: B groups of K responses.
        flat: one row with one copy of each prompt; otherwise a padded sequence for each response, for architectures
            whose layers carry a state from token to token.

    Returns:
        `policy` (B, K), nats, and `policy_tokens` (B, K, T), nats, 0 beyond a response's end; both fp32.
    """
    logits = _flat_logits(network, batch) if flat else _padded_logits(network, batch)
    tokens = token_logprobs(logits, batch.targets)
    prompts, responses = batch.shape
    policy = sum_by(tokens, batch.response, prompts * responses).view(prompts, responses)
    width = int(batch.slot.max()) + 1
    spread = tokens.new_zeros(prompts * responses, width).index_put((batch.response, batch.slot), tokens)
    return {"policy": policy, "policy_tokens": spread.view(prompts, responses, width)}


def _flat_logits(network: nn.Module, batch: MicroBatch) -> Tensor:
    # A mask with four dimensions is handed to every layer unread; without one, transformers would guess the borders
    # of packed sequences from the positions and guess wrong, because responses share their prompt's positions.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    output = network(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=unread,
        logits_to_keep=batch.keep,
        align_layout=batch.layout,
        use_cache=False,
    )
    return output.logits[0]


def _padded_logits(network: nn.Module, batch: MicroBatch) -> Tensor:
    ids: list[Tensor] = []
    keep: list[Tensor] = []
    row = batch.input_ids[0]
    for span in batch.layout.spans:
        start = span.start + span.prompt
        for length in span.responses:
            ids.append(torch.cat([row[span.start : span.start + span.prompt], row[start : start + length]]))
            keep.append(torch.arange(span.prompt - 1, span.prompt - 1 + length, device=row.device))
            start += length
    width = max(len(sequence) for sequence in ids)
    padded = torch.zeros(len(ids), width, dtype=torch.long, device=row.device)
    mask = torch.zeros_like(padded)
    for place, sequence in enumerate(ids):
        padded[place, : len(sequence)] = sequence
        mask[place, : len(sequence)] = 1
    logits = network(input_ids=padded, attention_mask=mask, use_cache=False).logits
    return logits[batch.response, torch.cat(keep)]


@torch.no_grad()
def flat_rows_error(network: nn.Module, vocabulary: int, device: torch.device) -> float:
    """Largest difference in nats per token between flat rows and padded sequences, on a group of three responses.

    It is infinite where the architecture cannot take a flat row at all.
    """
    generator = np.random.default_rng(0)
    lengths = (5, 4, 7)
    group = Group(
        index=0,
        prompt=generator.integers(0, vocabulary, 9).astype(np.int32),
        responses=tuple(generator.integers(0, vocabulary, length).astype(np.int32) for length in lengths),
        ratings=np.zeros(3, dtype=np.float32),
        where="self-test",
    )
    batch = flatten([group]).to(device)
    try:
        flat = measure(network, batch, flat=True)["policy_tokens"]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError):
        # Its forward knows no `logits_to_keep`, passes no keywords on, or reads the mask.
        return float("inf")
    padded = measure(network, batch, flat=False)["policy_tokens"]
    return float((flat - padded).abs().max())


def read_architecture(model: Model) -> Any:
    """The model's transformers configuration, never running code that comes with it."""
    if (Path(model.path) / "adapter_config.json").is_file() and not (Path(model.path) / "config.json").is_file():
        raise UserError(
            f"model.path={model.path}: holds adapters without their model. `align export RUN FOLDER` merges a run's "
            "adapters into a folder that would be right."
        )
    if not model.path or (model.path.startswith((".", "/", "~")) and not Path(model.path).is_dir()):
        raise UserError(f"model.path={model.path}: there is no such folder (seen from {Path.cwd()}).")
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={model.path}: no model can be read there: {_first_line(error)} "
            "A folder with config.json and safetensors, or a hub id that can be reached, would be right; a model's own "
            "code is never run."
        ) from error
    return config


def _refuse_pickles(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    found = f"only {', '.join(pickles)}, which can run code when read" if pickles else "no weights"
    raise UserError(f"model.path={path}: found {found}. Weights in safetensors would be right.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
