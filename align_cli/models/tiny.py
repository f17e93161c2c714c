"""A tiny language model with random weights, as an ordinary Hugging Face folder: where the embedded world starts."""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
POSITIONS = 4096  # of a family's model in small, whose tokens are characters
SMALL = {
    "hidden_size": 32,
    "n_embd": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 2,
    "n_head": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "n_positions": POSITIONS,
}


def character_tokenizer(alphabet: str, *, positions: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of `alphabet`, which puts the beginning-of-sequence token in front."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *alphabet])}
    characters = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    characters.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = Fuse()
    characters.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def build(folder: Path, *, alphabet: str, hidden: int, layers: int, heads: int, positions: int, seed: int) -> None:
    """Write a Llama of random weights and its character tokenizer to `folder`, the same for the same `seed`.

    Args:
        folder: made if absent; safetensors, loadable by `AutoModelForCausalLM` and `AutoTokenizer`.
        alphabet: the characters that have a token.
        hidden: width of the residual stream, a multiple of 2 x `heads`.
        layers: transformer blocks; 4 of width 128 are 0.8 million parameters.
        heads: attention heads.
        positions: longest sequence, in tokens.
        seed: of the weights; the caller's random state is left as it was.
    """
    tokenizer = character_tokenizer(alphabet, positions=positions)
    id_of = tokenizer.backend_tokenizer.token_to_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=id_of(BOS),
        eos_token_id=id_of(EOS),
        pad_token_id=id_of(PAD),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_like(folder: Path, architecture: Mapping[str, Any], *, scores: bool, seed: int) -> None:
    """Write a model of random weights of an architecture's family, and a tokenizer of characters, to `folder`.

    Args:
        architecture: `model_type` and sizes, as `conf/model` writes them out; the sizes become small.
        scores: a reward model, which has a head for scores and none for tokens.
        seed: of the weights; the caller's random state is left as it was.
    """
    tokenizer = character_tokenizer(string.printable, positions=POSITIONS)
    id_of = tokenizer.backend_tokenizer.token_to_id
    sizes = {key: SMALL.get(key, value) for key, value in architecture.items() if key != "model_type"}
    if "n_positions" not in sizes:
        sizes["max_position_embeddings"] = POSITIONS
    names = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model(
        architecture["model_type"],
        **{**sizes, "vocab_size": len(tokenizer), "dtype": "float32"},
        **{key: id_of(token) for key, token in names.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if scores:
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
