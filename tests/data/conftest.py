"""Small tokenizers of the kinds that models have, and one real one."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIALS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CORPUS = [
    "hello there, how are you? I am fine. The cat sat on the mat and ate the rat.",
    "user assistant system Human: Assistant: <|user|> <|assistant|> <|system|> [INST] [/INST] im_start eot_id </",
    "What is 3 + 4? It is 7.\n\nWrite one line.\nAnd another one; that is all.",
] * 4

TEMPLATES = {
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "chatml": """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +
 '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama3": """{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] +
 '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content =
 '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{
 '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "mistral": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' +
 message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{%
 else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}""",
}


def byte_level() -> Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's, with a post-processor that trims offsets."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def metaspace(*, legacy: bool) -> Tokenizer:
    """As Llama 2's and Mistral's: spaces are a letter, and one is added at the start of a text (or of every piece)."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    # The bytes are ordinary entries of the vocabulary: only the trainer wants them among the special tokens.
    made = Tokenizer.from_str(json.dumps(json.loads(made.to_str()) | {"added_tokens": []}))
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def wrapped(backend: Tokenizer, *, bos: bool) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    if bos:
        added = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
        backend.post_processor = added
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


MAKERS = {
    "byte_level": lambda: wrapped(byte_level(), bos=False),
    "byte_level_bos": lambda: wrapped(byte_level(), bos=True),
    "metaspace": lambda: wrapped(metaspace(legacy=False), bos=True),
    "legacy": lambda: wrapped(metaspace(legacy=True), bos=True),
}
MADE: dict[str, PreTrainedTokenizerBase] = {}


def made(kind: str) -> PreTrainedTokenizerBase:
    if kind not in MADE:
        MADE[kind] = MAKERS[kind]()
    MADE[kind].chat_template = None
    return MADE[kind]


@pytest.fixture(params=list(MAKERS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return made(request.param)


@pytest.fixture
def words() -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with a begin-of-sequence token and no chat template."""
    return made("byte_level_bos")


@pytest.fixture(params=list(TEMPLATES))
def chat_template(request: pytest.FixtureRequest) -> str:
    return TEMPLATES[request.param]


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Mistral 7B's own tokenizer, from the package mistral-common."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common, which ships the real tokenizer, is not installed")
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(spec.origin).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return LlamaTokenizerFast.from_pretrained(folder)
