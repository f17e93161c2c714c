"""Where a text can be cut so that its tokens are those of its pieces, one behind the other.

Most of the time of tokenising goes into words that were met before. A tokenizer that never puts a lone space and
what stands before it into one token, and never looks across that place, gives a word and the space before it the same
ids in every text. Whether it is of that kind is read off its own description: its normalizer keeps spaces where they
are, its pre-tokenizer splits before a space or, where it leaves a text whole, no entry of the vocabulary has a space
behind something else. What is not known to be so is never cut.
"""

import re
from collections.abc import Mapping

from tokenizers import Tokenizer

SPACE = "▁"  # how a space is written in the vocabularies of the SentencePiece family
NEVER = re.compile(r"(?!)")

# The branches of the patterns of GPT-2, GPT-4, Llama 3, Qwen 2 and Tekken. White space that is no line end stands
# in them at the start of a match only, and nothing looks back, so that each match that reaches a lone space ends
# there; the one that looks ahead begins with white space, of which there is none before the cut.
BRANCHES = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+"),
    *(r"\s+(?!\S)", r"\s+", r"\s*[\r\n]+", r"\s*[\r\n]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}", r"\p{N}{1,3}"),
    *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
}

Described = Mapping[str, object]


def cut_pattern(backend: Tokenizer, described: Described, private: str) -> re.Pattern[str]:
    """What matches the spaces before which a text can be cut; nothing, for a tokenizer that is not known.

    Args:
        described: what `backend.to_str` says, as an object.
        private: characters, as they stand in a pattern's class, that stand for added tokens.
    """
    if not (splits(described) and adds_no_space(backend)):
        return NEVER
    edge = rf"[^\s{SPACE}{private}]"
    return re.compile(rf" (?<={edge} )(?={edge})")


def splits(described: Described) -> bool:
    """Whether tokens never reach across the place before a lone space."""
    model = described["model"]
    assert isinstance(model, dict)
    strange = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(name) for name in strange):
        return False
    writes = normalizes(described["normalizer"])
    if writes is None:
        return False
    kinds = parts(described["pre_tokenizer"], "pretokenizers")
    *before, last = kinds or [{"type": "none"}]
    if last["type"] == "ByteLevel" and not writes:
        if last["use_regex"]:
            return not before
        return len(before) == 1 and before[0]["type"] == "Split" and known(before[0])
    whole = not kinds and writes
    metaspace = len(kinds) == 1 and last["type"] == "Metaspace" and last["replacement"] == SPACE and not writes
    if not (whole or metaspace) or model.get("ignore_merges"):
        return False
    vocabulary = model["vocab"]
    return SPACE in vocabulary and not any(SPACE in entry.lstrip(SPACE) for entry in vocabulary)


def parts(described: object, name: str) -> list[dict[str, object]]:
    """The parts of a normalizer or pre-tokenizer, one after another."""
    if described is None:
        return []
    assert isinstance(described, dict)
    if described["type"] != "Sequence":
        return [described]
    return [part for inner in described[name] for part in parts(inner, name)]


def normalizes(described: object) -> bool | None:
    """Whether a normalizer writes spaces as `SPACE`; None where it may do something else to them."""
    writes = False
    for part in parts(described, "normalizers"):
        if part["type"] == "Replace" and (part["pattern"], part["content"]) == ({"String": " "}, SPACE):
            writes = True
        elif part["type"] != "NFC" and (part["type"] != "Prepend" or part["prepend"] != SPACE):
            return None
    return writes


def known(split: Described) -> bool:
    """Whether a pre-tokenizer that splits by a pattern has one of the patterns in use."""
    pattern = split["pattern"]
    if split["behavior"] != "Isolated" or split["invert"] or not isinstance(pattern, dict) or "Regex" not in pattern:
        return False
    return set(branches(pattern["Regex"])) <= BRANCHES


def branches(pattern: str) -> list[str]:
    """The alternatives of a pattern, split at each `|` that is in no bracket."""
    found, depth = [""], 0
    for before, character in zip(" " + pattern, pattern, strict=False):
        if before != "\\":
            depth += (character in "([") - (character in ")]")
        if character == "|" and not depth:
            found.append("")
        else:
            found[-1] += character
    return found


def adds_no_space(backend: Tokenizer) -> bool:
    """Whether no added token of the vocabulary takes a lone space with it."""
    for token in backend.get_added_tokens_decoder().values():
        spaces = len(token.content) > 1 and not token.content.strip(" ")
        plain = not re.search(rf"[\s{SPACE}]", token.content)
        if not token.special and (token.lstrip or token.rstrip or token.single_word or not (spaces or plain)):
            return False
    return True
