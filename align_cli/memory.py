"""How much memory a run needs on each device, by term, from shapes alone: nothing is loaded.

Units are bytes. Per trained parameter AdamW holds two fp32 moments, and below fp32 an fp32 master and an fp32
gradient beside the weight; ZeRO shares moments and masters from stage 1 on, gradients from 2, weights from 3.
Attention computes its weights again in the backward pass; on a CPU it keeps as many as `segments.KEPT` has room for.
Models that cap their scores or have sinks keep all of them (`written`).
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from align_cli.engine import BUCKET, LIVE, EngineOptions
from align_cli.errors import UserError
from align_cli.models import recompute
from align_cli.models.adapters import Adapter, attach
from align_cli.models.causal import Model, read_architecture
from align_cli.models.head import CACHED
from align_cli.models.scalar import classifier
from align_cli.models.segments import KEPT

BLOCK = 64  # weights of NF4 that share a scale, an fp32 number


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide about memory.

    Attributes:
        parameters: all weights; a tied one counts once.
        trained: weights that training changes.
        linear: weights of linear layers, without the one that makes logits: what 4 bits are for.
        layers, hidden, heads, intermediate, kv_width, vocabulary: of the transformer; kv_width is heads times head
            size of the keys, experts_per_token multiplies the width of the feed-forward part.
        spared: the kinds of activations that `align_cli.models.recompute` finds in it.
        explicit: whether it caps its attention's scores or has sinks, which no fused kernel computes.
    """

    parameters: int
    trained: int
    linear: int
    layers: int
    hidden: int
    heads: int
    intermediate: int
    kv_width: int
    vocabulary: int
    experts_per_token: int
    spared: frozenset[Literal["norms", "products"]]
    explicit: bool


def architecture(model: Model) -> PretrainedConfig:
    """The model's configuration: as its YAML writes it out, else read from the model."""
    if model.architecture is None:
        return read_architecture(model)
    keys = dict(model.architecture)
    try:
        return AutoConfig.for_model(keys.pop("model_type"), **keys)
    except (KeyError, ValueError) as error:
        raise UserError(f"model.architecture: {error}; give model_type and its sizes.") from error


_known: dict[str, Shape] = {}  # of models whose YAML writes their sizes out; counting one takes a second


def shape(model: Model, adapter: Adapter, *, scores: bool = False) -> Shape:
    """Count a model's weights without making them.

    Args:
        scores: it is to be a reward model, which has a head for scores and none for tokens.
    """
    if model.architecture is None:
        return _counted(model, adapter, scores)
    told = repr((model.architecture, adapter, scores))
    if told not in _known:
        _known[told] = _counted(model, adapter, scores)
    return _known[told]


def _counted(model: Model, adapter: Adapter, scores: bool) -> Shape:
    config = architecture(model)
    kind: Any = AutoModelForCausalLM
    if scores:
        classifier(config, model.path)
        kind, config.num_labels = AutoModelForSequenceClassification, 1
    with torch.device("meta"):
        base: PreTrainedModel = kind.from_config(config)
        parameters = sum(p.numel() for p in base.parameters())
        layers = (m for m in base.modules() if type(m) is nn.Linear or isinstance(m, Conv1D))
        linear = sum(m.weight.numel() for m in layers if m is not base.get_output_embeddings())
        network = attach(base, adapter, seed=0, scores=scores)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    sizes = config.to_dict()
    hidden = _first(sizes, "hidden_size", "n_embd")
    heads = _first(sizes, "num_attention_heads", "n_head")
    head = sizes.get("head_dim") or hidden // heads
    return Shape(
        parameters=parameters + (trained if adapter.rank is not None else 0),
        trained=trained,
        linear=linear,
        layers=_first(sizes, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        intermediate=sizes.get("intermediate_size") or sizes.get("n_inner") or 4 * hidden,
        kv_width=(sizes.get("num_key_value_heads") or heads) * head,
        vocabulary=_first(sizes, "vocab_size"),
        experts_per_token=sizes.get("num_experts_per_tok") or 1,
        spared=recompute.kinds(base),
        explicit=bool(sizes.get("attn_logit_softcapping"))
        or any(n.endswith("sinks") for n, _ in base.named_parameters()),
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
    gpu: bool,
    ranks: int,
    node: int,
    response_share: float,
    sequence: float | None,
    repeated: float = 1.0,
    plain_head: bool,
    scores: bool = False,
    raters: int = 0,
    sampled: int = 0,
    frozen_reference: bool,
    frozen_bits: int | None,
    proposal: bool = False,
) -> dict[str, float]:
    """Bytes on one device, by term.

    Args:
        shape: of the policy.
        engine: stage, tokens of a micro-batch, checkpointing.
        dtype: of weights and activations.
        gpu: whether the device is one.
        ranks: devices that share the run.
        node: how many of them are on one node.
        response_share: share of a micro-batch's tokens whose logits are needed.
        sequence: tokens of a prompt with one response; None: unknown.
        repeated: keys that attention reads for each token of a row, where a prompt is one for several responses.
        plain_head: whether the model makes its logits itself, all at once.
        scores: whether it is a reward model, which makes none.
        raters: reward models that lie beside the policy at a time; each is taken to be as large.
        sampled: tokens of the sequences that are sampled at a time, prompts included.
        frozen_reference: whether a second model lies beside the policy.
        frozen_bits: bits of the weights of frozen linear layers where they are quantised; blocks share a scale.
        proposal: whether samples are drawn from a copy of the trained weights.
    """
    stage = -1 if engine.stage is None else engine.stage
    size = dtype.itemsize
    quantised = 0 if frozen_bits is None else shape.linear
    weights = (shape.parameters - quantised) * size + quantised * ((frozen_bits or 0) / 8 + 4 / BLOCK)
    weight_share = ranks if stage == 3 else 1
    state_share = ranks if stage >= 1 else 1
    gradient_share = ranks if stage >= 2 else 1
    # DeepSpeed's stages 1 and 2 update a copy of their share even where the weights are fp32.
    mastered = dtype != torch.float32 or stage in (1, 2)
    tokens = engine.micro_tokens
    layer = activation(shape, size, sparing=engine.sparing) * tokens
    layer += written(shape, size, gpu=gpu, seen=tokens if sequence is None else sequence, repeated=repeated) * tokens
    kept = (
        shape.hidden * size * tokens * shape.layers + layer if engine.gradient_checkpointing else layer * shape.layers
    )
    scored = math.ceil(tokens * response_share)
    if scores:
        logits = 0.0
    elif plain_head:
        logits = float(scored * shape.vocabulary * (size + 4 + 4))
    else:
        logits = head(
            scored,
            shape.hidden,
            shape.vocabulary,
            size,
            budget=engine.logits_mb * 1_000_000,
            trained=shape.trained == shape.parameters,
            gpu=gpu,
        )
    terms = {
        "weights": weights / weight_share,
        "gradients": shape.trained * 4 / gradient_share,
        "master weights": shape.trained * 4 / state_share if mastered else 0.0,
        "Adam moments": shape.trained * 8 / state_share,
        "activations": kept + (0 if gpu else attended(shape, size, tokens, sequence)),
        "logits": logits,
    }
    cache = float(sampled * shape.layers * 2 * shape.kv_width * size)
    if cache > kept + logits:  # samples are drawn before anything is kept for a backward pass
        del terms["activations"], terms["logits"]
        terms["keys and values of samples"] = cache
    if frozen_reference:
        terms["reference model"] = weights / weight_share
    if raters:
        terms["reward model" if raters == 1 else "reward models"] = raters * shape.parameters * size / weight_share
    if proposal:
        terms["proposal"] = shape.trained * size / weight_share
    if gpu and (stage >= 2 or (stage == 1 and dtype == torch.float32)):  # in bf16 stage 1 sums in place
        terms["buckets of gradients"] = BUCKET * size * (2 if stage == 2 else 1)
    if stage == 3:
        terms["gathered layers"] = max(2 * shape.parameters / shape.layers, min(LIVE, shape.parameters)) * size
        if 1 < node < ranks and not (frozen_reference or raters or proposal):
            terms["a node's copy of the weights"] = weights / node
    return terms


def head(scored: int, hidden: int, vocabulary: int, size: int, *, budget: int, trained: bool, gpu: bool) -> float:
    """Most bytes that `align_cli.models.head` needs at a time, beyond weights and their gradients.

    The states that predict, their gradient and what is added to it; a chunk of logits, in whose place its slopes live
    on to the backward pass if there is only one; an fp32 copy of what is normalised at a time: the chunk on a GPU, what
    a cache holds on a CPU. A family that caps its logits takes one copy more, which is not counted. A trained head also
    makes its gradient, and sums it in fp32 over several chunks.

    Args:
        scored: response tokens of a micro-batch.
        size: bytes of an element of weights and states.
        budget: bytes of logits at a time.
    """
    chunk = min(scored, max(1, budget // (vocabulary * size)))
    part = chunk if gpu else min(chunk, max(1, CACHED // vocabulary))
    states = scored * (3 * hidden * size + 4 + 4)
    logits = vocabulary * (chunk * size + part * 4)
    gradient = hidden * vocabulary * (size if chunk == scored else size + 4) if trained else 0
    return float(states + logits + gradient)


def activation(shape: Shape, size: int, *, sparing: bool) -> float:
    """Bytes that one layer keeps of one token for its backward pass.

    Two normalisations keep their input in fp32 (8 H), and below fp32 what they make of it and their output (4 H);
    queries, keys and values and the attention's output are kept (3 H and 3 times the keys' width in all); of the gated
    feed-forward part the gate, its activation, the other branch and their product (4 I). With `sparing`, of the norms
    only the input in its own type (2 H) and of the feed-forward part the two branches (2 I). Without a gate, or with
    norms that need no fp32, it is less; the figure is meant to be no less than the truth.
    """
    inner = shape.intermediate * shape.experts_per_token
    spared = shape.spared if sparing else frozenset()
    norms = 2 * size * shape.hidden if "norms" in spared else (8 + 4 * size) * shape.hidden
    products = 2 * size * inner if "products" in spared else 4 * size * inner
    return norms + size * (3 * shape.hidden + 3 * shape.kv_width) + products


def written(shape: Shape, size: int, *, gpu: bool, seen: float, repeated: float) -> float:
    """Bytes that one layer's attention keeps of one token beyond `activation`: keys and values once for each response.

    A GPU's kernel reads them in a row; in fp32, and for capped scores and sinks, they stand there for every head. The
    latter also keep their scores before the softmax and their weights in fp32, and the weights in their own type.

    Args:
        seen: tokens of a prompt with one response.
        repeated: keys that attention reads for each token of a row.
    """
    if shape.explicit:
        return 2 * size * (shape.hidden * repeated - shape.kv_width) + shape.heads * (4 + 4 + size) * seen
    if not gpu:
        return 0.0
    width = shape.hidden if size == 4 else shape.kv_width
    return 2 * size * (width * repeated - shape.kv_width)


def attended(shape: Shape, size: int, tokens: int, sequence: float | None) -> float:
    """Bytes of attention weights that a CPU keeps at most: a token sees no more than its prompt and its response."""
    seen = tokens if sequence is None else min(sequence, tokens)
    return min(KEPT, size * shape.layers * shape.heads * tokens * seen)


def device_bytes(named_gb: float | None, *, gpu: bool, ranks: int) -> tuple[float, str]:
    """The memory of a device, on a CPU a rank's part of the machine's, and where the figure comes from.

    Args:
        named_gb: `launch.memory_gb`.
        ranks: that share the machine's memory.
    """
    if named_gb is not None:
        return named_gb * 1e9, "launch.memory_gb"
    if torch.cuda.is_available() and gpu:
        return float(torch.cuda.get_device_properties(0).total_memory), torch.cuda.get_device_name(0)
    if gpu:
        return 80e9, "assumed; set launch.memory_gb"
    there = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return there / ranks, "this machine's memory" if ranks == 1 else f"this machine's memory over {ranks} ranks"
