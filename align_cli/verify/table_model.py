"""A language model that is a table, as an architecture of transformers.

It has a row of logits for each context that it knows and one for all others, so that it can be any distribution over
finitely many responses, and nothing but the loss decides where it ends. A context is everything since the first token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)


class TableConfig(PretrainedConfig):
    """Its contexts, as the whole numbers of `code`, in increasing order."""

    model_type = "align_table"

    def __init__(self, contexts: list[int] | None = None, vocab_size: int = 8, **keywords: Any) -> None:
        self.contexts = contexts or [0]
        self.vocab_size = vocab_size
        self.hidden_size = len(self.contexts) + 1
        self.num_hidden_layers = 1  # of a cache
        super().__init__(**keywords)


def code(ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """(N, T) a number for each context: of all tokens so far that are no padding, in the base vocabulary + 1."""
    found: list[Tensor] = []
    so_far = torch.zeros_like(ids[:, 0])
    for token, counts in zip(ids.unbind(-1), mask.unbind(-1), strict=True):
        so_far = torch.where(counts.bool(), so_far * (vocabulary + 1) + token + 1, so_far)
        found.append(so_far)
    return torch.stack(found, dim=-1)


class _Table(PreTrainedModel):
    config_class = TableConfig  # pyright: ignore[reportAssignmentType]
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)


class TableModel(_Table):
    """States: a unit vector for each context. It has no weights."""

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.contexts: list[int] = config.contexts
        self.vocabulary: int = config.vocab_size
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        ids = input_ids
        if use_cache and past_key_values is not None:
            # the tokens themselves are what a cache keeps of the past
            kept = input_ids[:, None, :, None].double()
            ids = past_key_values.update(kept, kept, 0)[0][:, 0, :, 0].long()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        codes = code(ids, mask, self.vocabulary)[:, -input_ids.shape[1] :].contiguous()
        known = torch.tensor(self.contexts, device=codes.device)
        place = torch.searchsorted(known, codes).clamp(max=len(known) - 1)
        place = torch.where(known[place] == codes, place, len(known))
        states = one_hot(place, len(known) + 1).float()
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past_key_values)  # pyright: ignore[reportArgumentType]


class TableForCausalLM(_Table, GenerationMixin):
    """The table: its weights are the logits, transposed."""

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.model = TableModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model

    def forward(self, input_ids: Tensor, logits_to_keep: int | Tensor = 0, **keywords: Any) -> CausalLMOutputWithPast:
        found = self.model(input_ids, **keywords)
        states = found.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[:, kept].to(self.dtype))
        return CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)


class TableForSequenceClassification(_Table):
    """A score for each context; of a sequence, that of its last token which is no padding."""

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.model = TableModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **keywords: Any
    ) -> SequenceClassifierOutputWithPast:
        found = self.model(input_ids, attention_mask, **keywords)
        ends = torch.full_like(input_ids[:, 0], -1) if attention_mask is None else attention_mask.sum(-1) - 1
        last = found.last_hidden_state[torch.arange(len(input_ids)), ends]
        return SequenceClassifierOutputWithPast(logits=self.score(last.to(self.dtype)))


def register() -> None:
    """Let transformers' Auto classes find the architecture; to do so again changes nothing."""
    AutoConfig.register(TableConfig.model_type, TableConfig, exist_ok=True)
    AutoModelForCausalLM.register(TableConfig, TableForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(TableConfig, TableForSequenceClassification, exist_ok=True)
