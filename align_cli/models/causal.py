"""A causal language model and the one function that gives log-probabilities of responses.

Policy, reference and evaluation all go through `measure`, so they cannot be computed differently.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
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

from align_cli.data.batches import Lengths, Measured, MicroBatch, flatten
from align_cli.data.store import Group
from align_cli.errors import UserError, first_line
from align_cli.logprobs import sum_by, token_logprobs, wide
from align_cli.models import attention, head
from align_cli.models.head import Scoring, Transform
from align_cli.models.recompute import sparing


@dataclass(frozen=True, kw_only=True)
class Model:
    """The `model` section of the configuration."""

    name: str
    path: str
    revision: str | None
    rows: Literal["auto", "shared", "packed", "padded"]
    head: Literal["auto", "plain"]
    architecture: dict[str, Any] | None


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, as it is saved beside the weights; a model that could not be loaded is refused now."""
    takes_flat_rows(read_architecture(model))
    _refuse_pickles(model.path)
    return read_tokenizer(model)


def read_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whatever else is in it."""
    try:
        return AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={model.path}: no tokenizer can be read: {first_line(error)} The folder needs the "
            "tokenizer's own files, such as tokenizer.json."
        ) from error


def load_model(model: Model, *, dtype: torch.dtype, bits: int | None) -> PreTrainedModel:
    """The model with its weights from safetensors, without dropout, on flat rows where it can take them."""
    network, absent = read_weights(AutoModelForCausalLM, model, dtype=dtype, bits=bits)
    refuse_absent(model, network, absent)
    head.install(network)
    return silence_dropout(network)


def read_weights(
    kind: Any, model: Model, *, dtype: torch.dtype, bits: int | None, **settings: Any
) -> tuple[PreTrainedModel, set[str]]:
    """A network with weights from safetensors, and the names of those that the files lack.

    Args:
        kind: one of transformers' Auto classes.
        settings: of its configuration.
    """
    config = read_architecture(model)
    _refuse_pickles(model.path)
    attention.register()
    implementation = attention.NAME if takes_flat_rows(config) and model.rows != "padded" else None
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its report of what is missing is ours to give, in one line
    try:
        loaded: Any = kind.from_pretrained(
            model.path,
            revision=commit_of(model) or model.revision,  # of the configuration that was just read
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=implementation,
            quantization_config=_nf4(dtype) if bits == 4 else None,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.path={model.path}: the weights cannot be read: {first_line(error)}") from error
    network, told = loaded
    return network, set(told["missing_keys"])


def refuse_absent(model: Model, network: PreTrainedModel, absent: set[str]) -> None:
    """Refuse a network some of whose weights the files lack."""
    if absent:
        raise UserError(
            f"model.path={model.path}: its safetensors lack {len(absent)} weights of {type(network).__name__}, "
            f"{min(absent)} among them; they would start at random."
        )


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
            f"model.path: model type '{config.model_type}' is not a causal language model of transformers."
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


@dataclass(frozen=True)
class Manner:
    """How a network is measured; `align_cli.assembly` finds out what it can do.

    Attributes:
        flat: one row with one copy of each prompt; otherwise a padded sequence for each response, for architectures
            whose layers carry a state from token to token.
        share: whether a flat row holds a prompt once, or once for each response.
        transform: what the family does to its logits, where the head goes on to log-probabilities by itself
            (`align_cli.models.head`); None: the model returns its logits.
        logits: bytes of logits that the head makes at a time.
        sparing: whether the backward pass computes again what is cheap (`align_cli.models.recompute`).
        temperature: of the distribution that is measured; it divides the logits.
        scalar: what a scalar head reads (`align_cli.models.scalar`): "values" beside the log-probabilities, "scores"
            in place of them; None: there is no such head.
    """

    flat: bool
    share: bool = True
    transform: Transform | None = None
    logits: int = 0
    sparing: bool = False
    temperature: float = 1.0
    scalar: Literal["scores", "values"] | None = None

    def lengths(self, lengths: Lengths) -> Lengths:
        """Of groups, as rows hold them."""
        return lengths if self.flat and self.share else Measured.apart(lengths)

    def flatten(self, groups: Sequence[Group], *, counted: bool = True) -> MicroBatch:
        """The row of these groups."""
        return flatten(groups, share=self.share, counted=counted)


def measure(network: nn.Module, batch: MicroBatch, manner: Manner) -> dict[str, Tensor]:
    """Log-probabilities of the batch's responses, or their scores.

    Args:
        network: a causal language model or a reward model, bare or wrapped by an engine or by adapters; called once.
        batch: B groups of K responses.

    Returns:
        `policy` (B, K), nats, and `policy_tokens` (B, K, T), nats, 0 beyond a response's end; with them `values`
        (B, K, T) of a network that has a head for them, from the states that predict the tokens, 0 beyond the end. Of
        a reward model `scores` (B, K) alone, from the state at each response's last token. All are fp32.
    """
    inputs, keep, last = _flat(batch) if manner.flat else _padded(batch)
    inputs["use_cache"] = False
    with sparing() if manner.sparing else nullcontext():
        if manner.scalar == "scores":
            at = torch.tensor(last, device=batch.input_ids.device)
            return {"scores": network(**inputs, align_scores=at)[batch.member]}
        if manner.scalar == "values":
            inputs["align_values"] = keep
        if manner.transform is not None:
            transform = replace(manner.transform, temperature=manner.temperature)
            inputs["align_scoring"] = Scoring(keep, batch.targets, transform, manner.logits)
        elif manner.flat:
            inputs["logits_to_keep"] = keep
        found = network(**inputs)
        output, values = found if manner.scalar == "values" else (found, None)
        if manner.transform is not None:
            tokens = output
        else:
            logits = output.logits[0] if manner.flat else output.logits.flatten(0, 1)[keep]
            tokens = token_logprobs(_tempered(logits, manner), batch.targets)
    different = sum(len(span.responses) for span in batch.layout.spans)
    policy = sum_by(tokens, batch.response, different)[batch.member]
    columns = {"policy": policy, "policy_tokens": _spread(tokens, batch, different)}
    return columns if values is None else {**columns, "values": _spread(values, batch, different)}


def _tempered(logits: Tensor, manner: Manner) -> Tensor:
    if manner.temperature == 1.0:
        return logits
    return wide(logits) / manner.temperature


def _spread(tokens: Tensor, batch: MicroBatch, different: int) -> Tensor:
    """(B, K, T) of a figure (N,) of each token of the different responses."""
    found = tokens.new_zeros(different, batch.longest).index_put((batch.response, batch.slot), tokens)
    return found[batch.member]


def _flat(batch: MicroBatch) -> tuple[dict[str, Any], Tensor, list[int]]:
    """What the network is called with; the places of the states that predict tokens, and of each last token's."""
    # A mask with four dimensions is handed to every layer unread; without one, transformers would guess the borders
    # of packed sequences from the positions and guess wrong, because responses share their prompt's positions.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": unread}
    spans = batch.layout.spans
    ends = [end for span in spans for end in list(accumulate(span.responses, initial=span.start + span.prompt))[1:]]
    last = [end - 1 for end in ends]
    return inputs | {"align_layout": batch.layout}, batch.keep, last


def _padded(batch: MicroBatch) -> tuple[dict[str, Any], Tensor, list[int]]:
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
    last = [width * place + len(sequence) - 1 for place, sequence in enumerate(ids)]
    inputs = {"input_ids": padded, "attention_mask": mask}
    return inputs, torch.cat([width * n + k for n, k in enumerate(keep)]), last


@torch.no_grad()
def error_of(network: nn.Module, manner: Manner, vocabulary: int, device: torch.device) -> float:
    """Largest difference in nats per token from padded sequences and the model's own logits, on three responses.

    It is infinite where the architecture cannot be measured so at all.
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
    batch = manner.flatten([group]).to(device)
    try:
        found = measure(network, batch, manner)["policy_tokens"]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError):
        # Its forward knows no `logits_to_keep`, passes no keywords on, or reads the mask.
        return float("inf")
    padded = measure(network, batch, Manner(flat=False))["policy_tokens"]
    return float((found - padded).abs().max())


def read_architecture(model: Model) -> Any:
    """The model's transformers configuration, never running code that comes with it."""
    if (Path(model.path) / "adapter_config.json").is_file() and not (Path(model.path) / "config.json").is_file():
        raise UserError(
            f"model.path={model.path}: holds adapters without their model. Use the folder into which "
            "`align export RUN FOLDER` merges a run's adapters."
        )
    if not model.path or (model.path.startswith((".", "/", "~")) and not Path(model.path).is_dir()):
        raise UserError(f"model.path={model.path}: there is no such folder (seen from {Path.cwd()}).")
    if (Path(model.path) / "model" / "config.json").is_file() and not (Path(model.path) / "config.json").is_file():
        raise UserError(f"model.path={model.path}: a run, not a model; use {Path(model.path) / 'model'}.")
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={model.path}: no model can be read there: {first_line(error)} "
            "Use a folder with config.json and safetensors, or a hub id that can be reached; a model's own code is "
            "never run."
        ) from error
    return config


def commit_of(model: Model) -> str | None:
    """The commit of the hub whose configuration was read last for a `model` section; None where it names a folder.

    Raises:
        UserError: it cannot be told.
    """
    if Path(model.path).is_dir():
        return None
    file = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    if not isinstance(file, str):
        raise UserError(f"model.path={model.path}: its commit on the hub cannot be told; set model.revision to one.")
    return Path(file).parent.name


def positions(config: Any) -> int | None:
    """The longest sequence that a model was made for, in tokens; None where its configuration does not say."""
    told = config.to_dict()
    named = [told[name] for name in ("max_position_embeddings", "n_positions") if isinstance(told.get(name), int)]
    return named[0] if named else None


def _refuse_pickles(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    found = f"only {', '.join(pickles)}, which can run code when read" if pickles else "no weights"
    raise UserError(f"model.path={path}: found {found}. Use weights in safetensors.")
