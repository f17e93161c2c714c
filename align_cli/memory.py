"""How much memory a run needs on each device, by term, from shapes alone: nothing is loaded.

Units are bytes. Per trained parameter AdamW holds two fp32 moments, and below fp32 an fp32 master and an fp32
gradient beside the weight; ZeRO shares moments and masters from stage 1 on, gradients from 2, weights from 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from align_cli.engine import EngineOptions
from align_cli.errors import UserError
from align_cli.models.adapters import Adapter, attach
from align_cli.models.causal import Model, read_architecture


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide about memory.

    Attributes:
        parameters: all weights; a tied one counts once.
        trained: weights that training changes.
        layers, hidden, intermediate, kv_width, vocabulary: of the transformer; kv_width is heads times head size of
            the keys, experts_per_token multiplies the width of the feed-forward part.
    """

    parameters: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int
    experts_per_token: int


def architecture(model: Model) -> PretrainedConfig:
    """The model's configuration: as its YAML writes it out, else read from the model."""
    if model.architecture is None:
        return read_architecture(model)
    keys = dict(model.architecture)
    try:
        return AutoConfig.for_model(keys.pop("model_type"), **keys)
    except (KeyError, ValueError) as error:
        raise UserError(f"model.architecture: {error}; model_type and its sizes would be right.") from error


def shape(model: Model, adapter: Adapter) -> Shape:
    """Count a model's weights without making them."""
    config = architecture(model)
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        parameters = sum(p.numel() for p in base.parameters())
        network = attach(base, adapter, seed=0)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    sizes = config.to_dict()
    hidden = _first(sizes, "hidden_size", "n_embd")
    heads = _first(sizes, "num_attention_heads", "n_head")
    head = sizes.get("head_dim") or hidden // heads
    return Shape(
        parameters=parameters + (trained if adapter.rank is not None else 0),
        trained=trained,
        layers=_first(sizes, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=sizes.get("intermediate_size") or sizes.get("n_inner") or 4 * hidden,
        kv_width=(sizes.get("num_key_value_heads") or heads) * head,
        vocabulary=_first(sizes, "vocab_size"),
        experts_per_token=sizes.get("num_experts_per_tok") or 1,
    )


def _first(sizes: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if sizes.get(name):
            return int(sizes[name])
    raise UserError(f"the model's configuration has none of {', '.join(names)}, so its memory cannot be planned.")


def per_device(
    shape: Shape,
    engine: EngineOptions,
    *,
    dtype: torch.dtype,
    ranks: int,
    response_share: float,
    frozen_reference: bool,
    frozen_bits: int | None,
) -> dict[str, float]:
    """Bytes on one device, by term.

    Args:
        shape: of the policy.
        engine: stage, tokens of a micro-batch, checkpointing.
        dtype: of weights and activations.
        ranks: devices that share the run.
        response_share: share of a micro-batch's tokens whose logits are needed.
        frozen_reference: whether a second model lies beside the policy.
        frozen_bits: bits of frozen weights where they are quantised.
    """
    stage = -1 if engine.stage is None else engine.stage
    size = dtype.itemsize
    precise = dtype == torch.float32
    frozen = shape.parameters - shape.trained
    weights = shape.trained * size + frozen * (size if frozen_bits is None else frozen_bits / 8)
    weight_share = ranks if stage == 3 else 1
    state_share = ranks if stage >= 1 else 1
    gradient_share = ranks if stage >= 2 else 1
    tokens = engine.micro_tokens
    layer = activation(shape, size) * tokens
    kept = (
        shape.hidden * size * tokens * shape.layers + layer if engine.gradient_checkpointing else layer * shape.layers
    )
    terms = {
        "weights": weights / weight_share,
        "gradients": shape.trained * 4 / gradient_share,
        "master weights": 0.0 if precise else shape.trained * 4 / state_share,
        "Adam moments": shape.trained * 8 / state_share,
        "activations": kept,
        "logits": tokens * response_share * shape.vocabulary * (size + 4 + 4),
    }
    if frozen_reference:
        terms["reference model"] = weights / weight_share
    if stage == 3:
        terms["gathered layers"] = 2 * shape.parameters / shape.layers * size
    return terms


def activation(shape: Shape, size: int) -> float:
    """Bytes that one layer keeps of one token for its backward pass.

    Two normalisations keep their input in fp32 (8 H) and their output; queries, keys and values before and after the
    rotation, and the attention's output are kept (7 H and 3 times the keys' width in all); of the gated feed-forward
    part the gate, its activation, the other branch and their product (4 I). Without a gate, or with norms that need no
    fp32, it is less; the figure is meant to be no less than the truth.
    """
    inner = shape.intermediate * shape.experts_per_token
    return 8 * shape.hidden + size * (7 * shape.hidden + 3 * shape.kv_width + 4 * inner)


def device_bytes(named_gb: float | None, *, gpu: bool) -> tuple[float, str]:
    """The memory of a device and where the figure comes from."""
    if named_gb is not None:
        return named_gb * 1e9, "launch.memory_gb"
    if torch.cuda.is_available() and gpu:
        return float(torch.cuda.get_device_properties(0).total_memory), torch.cuda.get_device_name(0)
    if gpu:
        return 80e9, "assumed; set launch.memory_gb"
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "this machine's memory"
