"""Models of random weights with a tokenizer whose words are token ids, as folders that both sides read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN)
EOS_ID = SPECIAL.index(EOS)


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; input and output embeddings are one matrix."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    like: str

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def matrix_weights(self) -> int:
        """Weights of the blocks' matrices: what a token is multiplied with on its way."""
        narrow = self.kv_heads * self.head_width
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * narrow
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weights(self) -> int:
        """All weights."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.matrix_weights + norms + self.vocabulary * self.hidden


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("30M", 512, 8, 8, 8, 1408, 32_000, "a small Llama; 26 M weights in the blocks, 42 M with embeddings"),
        Shape("135M", 576, 30, 9, 3, 1536, 49_152, "SmolLM2-135M; 106 M weights in the blocks, 135 M with embeddings"),
        Shape("tiny", 64, 2, 2, 2, 128, 512, "a Llama small enough that thousands of groups pass in a minute"),
        Shape("world", 128, 4, 4, 4, 384, 47, "the embedded world's model, but for tied embeddings"),
    )
}


def write_model(shape: Shape, folder: Path, *, seed: int) -> Path:
    """A Hugging Face folder: config.json, safetensors in fp32, tokenizer.json. Does nothing where it is complete."""
    if (folder / "tokenizer.json").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=EOS_ID,
        dtype="float32",
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(shape.vocabulary).save_pretrained(folder)
    return folder


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of the words t4, t5, ...: word and id are the same number, so a text has one tokenisation."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(SPECIAL)}
    words |= {f"t{number}": number for number in range(len(SPECIAL), vocabulary)}
    backend = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )


def text(ids: np.ndarray) -> str:
    """Words of token ids, with a space before each: a prompt's and a response's text joined read as one."""
    return "".join(f" t{number}" for number in ids)


if __name__ == "__main__":
    from benchmark import worker

    job = worker.read_job()
    write_model(SHAPES[job["shape"]], Path(job["folder"]), seed=job["seed"])
    worker.write_result(None)
