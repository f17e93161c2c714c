import json
import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align_cli.data.pieces import BRANCHES, NEVER, branches, cut_pattern
from align_cli.data.records import Message, Record
from align_cli.data.tokens import Template, Tokenised
from tests.data.conftest import CORPUS, made, wrapped

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_pattern(pattern: str) -> PreTrainedTokenizerFast:
    """As Llama 3's, Qwen's and Tekken: bytes of pieces that a pattern gives."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*CORPUS, "a  b\n\n  c 12 345 6,7 's 'S /\r\n é é  猫 . !\n"], trainer)
    return wrapped(backend, bos=False)


def spaced() -> PreTrainedTokenizerBase:
    """With added tokens that are runs of spaces, as GPT-NeoX has."""
    backend = made_backend()
    backend.add_tokens([AddedToken(" " * width, normalized=True) for width in (2, 3, 4)])
    return wrapped(backend, bos=False)


def made_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


CUT: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte_level": lambda: made("byte_level"),
    "byte_level_bos": lambda: made("byte_level_bos"),
    "metaspace": lambda: made("metaspace"),
    "legacy": lambda: made("legacy"),
    "qwen": lambda: by_pattern(QWEN),
    "llama3": lambda: by_pattern(LLAMA3),
    "tekken": lambda: by_pattern(TEKKEN),
    "spaces": spaced,
}
ALPHABET = [
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\xa0",
    "▁",
    "Ġ",
    "a",
    "the",
    "cat",
    "'s",
    "'S",
    ".",
    "/",
    "!",
    "12",
]
ALPHABET += [
    "345",
    "é",
    "e\u0301",
    "\u0301",
    "猫",
    "</s>",
    "<s>",
    "<",
    "|im_end|>",
    "\x1c",
    "\u200b",
    "X",
    "🙂",
    "ſ",
    "\x85",
]
TEXTS = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=14).map("".join)


@pytest.fixture(scope="module", params=list(CUT))
def templates(request: pytest.FixtureRequest) -> tuple[Template, Template]:
    """Two of one tokenizer: one that cuts texts, and one that does not."""
    tokenizer = CUT[request.param]()
    cutting, plain = (Template(tokenizer, template="text", system=None) for _ in range(2))
    assert cutting.codec.cut is not NEVER
    plain.codec.cut = NEVER
    return cutting, plain


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=TEXTS, responses=st.lists(TEXTS, min_size=1, max_size=3))
@example(prompt="the cat ", responses=["the cat", " the cat", "  the cat"])
@example(prompt="the cat", responses=["s and the rat", " the rat\n", "the rat "])
@example(prompt="a▁ b ▁ c", responses=["a \u0301b e \u0301", "</s> a </s>", "1 234 5 678"])
def test_a_text_that_is_cut_has_the_ids_of_the_whole(
    templates: tuple[Template, Template], prompt: str, responses: list[str]
) -> None:
    spoken = (Message(role="user", content=prompt),)
    records = [Record(one, tuple(responses), tuple([0.0] * len(responses)), "") for one in (prompt, spoken)]
    cut, whole = (template.tokenise(records) for template in templates)
    for one, other in zip(cut, whole, strict=True):
        assert isinstance(one, Tokenised) and isinstance(other, Tokenised)
        assert one.prompt.tolist() == other.prompt.tolist()
        assert [ids.tolist() for ids in one.responses] == [ids.tolist() for ids in other.responses]


def test_mistrals_run_of_spaces_is_one_token_also_behind_a_sign_for_a_space(mistral: PreTrainedTokenizerBase) -> None:
    """A text may hold the character that the vocabulary writes a space as; the vocabulary joins runs of it."""
    cutting, plain = (Template(mistral, template="text", system=None) for _ in range(2))
    plain.codec.cut = NEVER
    record = Record("the cat▁ sat on▁▁ it", ("a▁ b c", " one  two▁ three "), (1.0, 0.0), "")
    [[cut], [whole]] = (template.tokenise([record]) for template in (cutting, plain))
    assert isinstance(cut, Tokenised) and isinstance(whole, Tokenised)
    assert [ids.tolist() for ids in (cut.prompt, *cut.responses)] == [
        ids.tolist() for ids in (whole.prompt, *whole.responses)
    ]


def test_words_are_encoded_once(templates: tuple[Template, Template], monkeypatch: pytest.MonkeyPatch) -> None:
    cutting, _ = templates
    record = Record("the cat and the rat", ("the mat and the cat", "one line and a rat"), (1.0, 0.0), "")
    cutting.tokenise([record])
    encoded: list[str] = []
    monkeypatch.setattr(cutting.codec, "encode", lambda texts: encoded.extend(texts) or [])
    cutting.tokenise([record])
    assert encoded == []


def test_what_is_kept_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    template = Template(made("byte_level"), template="text", system=None)
    monkeypatch.setattr("align_cli.data.tokens.MOST_KEPT", 2000)
    for number in range(300):
        template.tokenise([Record(f"number {number}", (f"is {number} or",), (1.0,), "")])
        assert template.codec.kept < 2000 + 500 and len(template.codec.words) < 40


def cuts(backend: Tokenizer) -> bool:
    return cut_pattern(backend, json.loads(backend.to_str()), "\U00100000") is not NEVER


def test_a_vocabulary_with_a_space_inside_an_entry_is_not_cut() -> None:
    legacy = Tokenizer.from_str(made("legacy").backend_tokenizer.to_str())  # pyright: ignore
    described = json.loads(legacy.to_str())
    assert cuts(legacy)
    described["model"]["vocab"]["a▁b"] = len(described["model"]["vocab"]) + 20
    assert not cuts(Tokenizer.from_str(json.dumps(described)))


@pytest.mark.parametrize(
    "strange",
    [
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}},
    ],
)
def test_a_tokenizer_that_is_not_known_is_not_cut(strange: dict[str, object]) -> None:
    described = json.loads(made("byte_level").backend_tokenizer.to_str())  # pyright: ignore
    assert not cuts(Tokenizer.from_str(json.dumps(described | strange)))


@pytest.mark.parametrize(
    "token", [AddedToken("a b"), AddedToken(" "), AddedToken("x", lstrip=True), AddedToken("x", single_word=True)]
)
def test_an_added_token_that_takes_a_space_with_it_forbids_cuts(token: AddedToken) -> None:
    backend = Tokenizer.from_str(made("byte_level").backend_tokenizer.to_str())  # pyright: ignore
    backend.add_tokens([token])
    assert not cuts(backend)


@pytest.mark.parametrize("pattern", [QWEN, LLAMA3, TEKKEN])
def test_patterns_are_split_at_their_own_alternatives(pattern: str) -> None:
    assert "|".join(branches(pattern)) == pattern and len(branches(pattern)) == 7
    assert set(branches(pattern)) <= BRANCHES


def test_only_the_start_of_a_match_can_be_a_space_in_a_known_pattern() -> None:
    """Behind its first character no branch has a class or letter that a space fits, unless it is all white space."""
    for branch in BRANCHES:
        if branch in (r"\s+(?!\S)", r"\s+", r"\s*[\r\n]+", r"\s*[\r\n]"):
            continue
        rest = re.sub(r"^( \?|\[\^\\r\\n\\p\{L\}\\p\{N\}\]\?)", "", branch)
        assert " " not in rest and not re.search(r"\\s(?!\\p\{L\}\\p\{N\}\])", rest)
