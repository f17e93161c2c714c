"""A number from a state: the score that a reward model gives a response, the value that a critic gives a token.

A reward model is transformers' own sequence classifier with one label, whose `score` head reads the state at a
response's last token. A critic is a head named `value_head` on the policy's trunk, which reads the states that predict
the response's tokens. Either head is called within the network's own call, where ZeRO-3 has its weights at hand, and
computes in fp32 whatever the weights are in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import update_wrapper
from types import MethodType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from align_cli.data.batches import flatten
from align_cli.data.store import Group
from align_cli.errors import UserError
from align_cli.models import causal
from align_cli.models.causal import Manner, Model, measure

SCORE, VALUE = "score", "value_head"  # names of the heads in their networks


class ScalarHead(nn.Linear):
    """A linear head whose product is in fp32, so that two scores that bf16 would round to one can differ."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., 1) from states (..., H)."""
        wide = torch.promote_types(input.dtype, torch.float32)
        return linear(input.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))


def is_reward_model(config: Any) -> bool:
    """Whether a folder's configuration is that of a model with a head for scores."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def classifier(config: Any, path: str) -> Any:
    """The class of transformers that a reward model of this architecture is.

    Raises:
        UserError: there is none, or the folder's own has more labels than one.
    """
    try:
        found: Any = AutoModelForSequenceClassification._model_mapping[type(config)]
    except KeyError as error:
        raise UserError(
            f"model.path={path}: transformers has no sequence classifier of the model type '{config.model_type}', "
            "which a reward model is. Use another family."
        ) from error
    if is_reward_model(config) and config.num_labels != 1:
        raise UserError(
            f"model.path={path}: a classifier with {config.num_labels} labels; a reward model has one, a score."
        )
    return found


def load_reward_model(model: Model, *, dtype: torch.dtype) -> PreTrainedModel:
    """A reward model on the trunk that a folder holds.

    Its head is the folder's where that is a reward model, and 0 where it is a causal language model, so that no
    response is preferred before the first update. With the keyword `align_scores` (U,), places of states in the
    flattened forward pass, it returns their scores (U,) in place of its own output.

    Raises:
        UserError: the weights cannot be read, or the architecture has no such model.
    """
    config = causal.read_architecture(model)
    kind = classifier(config, model.path)
    tokenizer = causal.load_tokenizer(model)
    network, absent = causal.read_weights(
        AutoModelForSequenceClassification, model, dtype=dtype, bits=None, num_labels=1
    )
    head = dict(network.named_children()).get(SCORE)
    if type(head) is not nn.Linear:
        raise UserError(
            f"model.path={model.path}: {kind.__name__} has no linear head named '{SCORE}'. Use a family whose "
            "classifier has one; those of causal language models mostly do."
        )
    fresh = {f"{SCORE}.{name}" for name, _ in head.named_parameters()}
    if not is_reward_model(config) and absent == fresh:
        with torch.no_grad(), _whole(head):
            for parameter in head.parameters():
                parameter.zero_()
        absent = set()
    causal.refuse_absent(model, network, absent)
    # The classifier reads the last token that is no padding: where padding is the stop token, the token before it.
    # Without padding it takes one sequence at a time, and reads its last token.
    ends = [tokenizer.eos_token_id, *_listed(config.eos_token_id)]
    padding = tokenizer.pad_token_id
    network.config.pad_token_id = None if padding in ends else padding
    _install_scores(network, head)
    return causal.silence_dropout(network)


def _listed(tokens: Any) -> list[Any]:
    return tokens if isinstance(tokens, list) else [tokens]


def _install_scores(network: PreTrainedModel, head: nn.Module) -> None:
    head.__class__ = ScalarHead
    plain: Any = type(network).forward

    def forward(self: Any, *arguments: Any, align_scores: Tensor | None = None, **keywords: Any) -> Any:
        if align_scores is None:
            return plain(self, *arguments, **keywords)
        return _read(self.score, self.base_model(*arguments, **keywords)[0], align_scores)

    network.forward = MethodType(update_wrapper(forward, plain), network)


def attach_value_head(network: PreTrainedModel | PeftModel) -> None:
    """Give a causal language model a head for values, 0 at first, which trains with it and is in its checkpoints.

    With the keyword `align_values` (N,), places of states in the flattened forward pass, the network returns its own
    output and their values (N,). Adapters are attached before.
    """
    base: Any = network.get_base_model() if isinstance(network, PeftModel) else network
    some = next(base.parameters())
    hidden = int(base.config.get_text_config().hidden_size)
    base.value_head = ScalarHead(hidden, 1, device=some.device, dtype=base.dtype)
    with torch.no_grad(), _whole(base.value_head):
        for parameter in base.value_head.parameters():
            parameter.zero_()
    plain = base.forward.__func__

    def forward(self: Any, *arguments: Any, align_values: Tensor | None = None, **keywords: Any) -> Any:
        if align_values is None:
            return plain(self, *arguments, **keywords)
        states: list[Tensor] = []
        catch = self.get_decoder().register_forward_hook(lambda module, given, found: states.append(found[0]))
        try:
            output = plain(self, *arguments, **keywords)
        finally:
            catch.remove()
        return output, _read(self.value_head, states[0], align_values)

    base.forward = MethodType(update_wrapper(forward, plain), base)


def _read(head: nn.Module, states: Tensor, places: Tensor) -> Tensor:
    """(N,) of the states at `places` among all (rows, T, H), flattened."""
    return head(states.flatten(0, 1)[places])[:, 0]


@contextmanager
def _whole(head: nn.Module) -> Iterator[None]:
    """Within the block the weights are whole, and what is done to them holds; every rank does the same."""
    partitioned = [parameter for parameter in head.parameters() if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


# --- does a network give the same numbers however its sequences lie


@torch.no_grad()
def error_of(network: PreTrainedModel | PeftModel, module: nn.Module, manner: Manner, device: torch.device) -> float:
    """Largest difference from what the model's own code gives, as a share of its largest number; every rank calls it.

    A head that is 0 would hide any mistake, so another is put in its place meanwhile. Scores are held against the
    model's own output on each sequence alone, values against padded sequences. It is infinite where the architecture
    cannot be measured so at all.

    Args:
        network: the model.
        module: what a forward pass calls.
        manner: how it is measured, with its `scalar`.
    """
    base: Any = network.get_base_model() if isinstance(network, PeftModel) else network
    generator = np.random.default_rng(0)
    padding = base.config.pad_token_id
    vocabulary = int(base.config.vocab_size)

    def drawn(length: int) -> np.ndarray:
        found = generator.integers(0, vocabulary, length).astype(np.int32)
        return np.where(found == padding, (found + 1) % vocabulary, found).astype(np.int32)

    responses = tuple(drawn(length) for length in (5, 4, 7))
    group = Group(0, drawn(9), responses, np.zeros(3, dtype=np.float32), "self-test")
    batch = manner.flatten([group]).to(device)
    with _probing(base.score if manner.scalar == "scores" else base.value_head):
        try:
            found = measure(module, batch, manner)[str(manner.scalar)]
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError):  # as `align_cli.models.causal.error_of`
            return float("inf")
        if manner.scalar == "values":
            plain = measure(module, flatten([group]).to(device), Manner(flat=False, scalar="values"))["values"]
        else:
            rows = [torch.from_numpy(np.concatenate([group.prompt, each]))[None].long() for each in responses]
            alone = [module(input_ids=row.to(device), attention_mask=torch.ones_like(row).to(device)) for row in rows]
            plain = torch.stack([each.logits[0, 0] for each in alone])[None]
    return float((found - plain).abs().max() / plain.abs().max())


@contextmanager
def _probing(head: nn.Module) -> Iterator[None]:
    """Within the block the head is a random direction."""

    def project(module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        states = given[0].to(found.dtype)
        drawn = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0))
        return (states @ drawn.to(states))[..., None]

    hook = head.register_forward_hook(project)
    try:
        yield
    finally:
        hook.remove()
