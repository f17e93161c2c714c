"""A tiny language model with random weights, as an ordinary Hugging Face folder: where the embedded world starts."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"


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
