"""Exact token ids of a prompt and its responses.

What holds for every record and every tokenizer with a `tokenizers` backend:

- the prompt is encoded once, so its ids are the same for all K responses, and are those that generation starts from;
- a sequence is the prompt's ids followed by a response's ids;
- there is one begin-of-sequence token if the tokenizer puts one, whether or not the chat template writes it too;
- a response ends with its stop token, once: the first special token that the chat template writes after an assistant
  turn, or the end-of-sequence token;
- a string such as `</s>` inside a prompt or a response stays text. Only what the template itself writes becomes a
  special token;
- where no text looks like a special token, prompt and response ids are those of the tokenizer's own
  `apply_chat_template`, unless a token would reach across the border of prompt and response: it is cut there.

The means: in a copy of the tokenizer every special token has a stand-in, a private-use character that is an ordinary
added token. Texts are escaped before the template sees them, the template's delimiters become stand-ins, and the copy
is told to read special strings as text. Because a stand-in splits the text as the special token does, everything
between is encoded as the tokenizer itself would.

The text template joins prompt and response as they are: a response that should begin with a space has to have it.
A dialogue is written with "Human:" and "Assistant:" under it, as in Anthropic's HH. A chat template that changes
texts (strips them) is followed: what is trained on is what it writes.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, filterfalse, islice, pairwise
from typing import Protocol

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align_cli.data.options import TemplateName
from align_cli.data.pieces import cut_pattern
from align_cli.data.records import Message, Record, RowError
from align_cli.errors import UserError

# Supplementary private-use area B, whose characters no text in use holds: the area A has the icons of some fonts.
STAND_IN = 0x100000  # one character for each special token that the template writes
ESCAPE = 0x108000  # one character for each special string inside a text
MOST_SPECIALS = 0x7FF0
PROBE = chr(ESCAPE + MOST_SPECIALS)  # stands for a text while the template is examined
ANCHOR = chr(STAND_IN + MOST_SPECIALS)  # a border that no token crosses

BEFORE = "a"  # stands before a space to encode what follows it
LINE = 32  # words encoded in one text
MOST_KEPT = 1 << 23  # characters of the words whose ids are kept, some 40 MB with all
ENTRY = 64  # what an entry costs beside them, in characters

DAY = datetime.date(2024, 7, 26)  # what templates that write the date are told: the day that Llama's own fall back to
DATED = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

Ids = NDArray[np.int32]

SPEAKERS = {"user": "Human", "assistant": "Assistant"}


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A record as token ids; every response ends with the stop token."""

    prompt: Ids
    responses: tuple[Ids, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A record as text, special tokens being stand-ins; a sequence is `prompt` + a response."""

    prompt: str
    responses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and the encoding that knows their characters."""

    ids: list[int]
    encoding: Encoding

    def border(self, position: int) -> int | None:
        """The first token that starts at or after a character; None if a token reaches across it."""
        at = self.encoding.char_to_token(position)
        if at is not None:
            start, _ = self.encoding.token_to_chars(at) or (position, position)
            return at if start >= position else None
        # A character in no token, such as a space that the tokenizer drops.
        return next((at for at, (start, _) in enumerate(self.encoding.offsets) if start >= position), len(self.ids))


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """What tells the characters of each token.

    Raises:
        UserError: the tokenizer has no such thing.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer.backend_tokenizer
    raise UserError(
        f"the tokenizer {type(tokenizer).__name__} gives no character offsets. "
        "Use a model whose folder has a tokenizer.json (a fast tokenizer)."
    )


class Codec:
    """A tokenizer in which only stand-ins become special tokens.

    Raises:
        UserError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = backend_of(tokenizer)
        written = json.loads(backend.to_str())
        # A post-processor may trim spaces off the offsets, which hides tokens that reach across a border.
        written |= {"post_processor": None, "truncation": None, "padding": None}
        self.backend = Tokenizer.from_str(json.dumps(written))
        self.backend.encode_special_tokens = True

        added = {token.content: token for token in backend.get_added_tokens_decoder().values() if token.special}
        named = {text: AddedToken(text) for text in tokenizer.all_special_tokens}
        specials = named | added
        assert len(specials) < MOST_SPECIALS
        self.stand_in = {text: chr(STAND_IN + index) for index, text in enumerate(specials)}
        self.escape_of = {text: chr(ESCAPE + index) for index, text in enumerate(specials)}
        self.text_of = {character: text for text, character in self.escape_of.items()}
        self.backend.add_tokens([standing(self.stand_in[text], token) for text, token in specials.items()])
        self.backend.add_tokens([AddedToken(ANCHOR, special=False, normalized=False)])
        self.id_of = {number(self.backend, self.stand_in[text]): number(backend, text) for text in specials}
        longest_first = sorted(specials, key=len, reverse=True)
        self.specials = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        private = f"{chr(STAND_IN)}-{ANCHOR}{chr(ESCAPE)}-{PROBE}"
        self.private = re.compile(f"[{private}]")
        self.escaped = re.compile("|".join(self.text_of) or r"(?!)")
        self.cut = cut_pattern(backend, written, private)
        self.words: dict[str, bytes] = {}  # the ids of a word behind a space
        self.starts: dict[tuple[str, str], bytes] = {}  # the ids of the start of a text behind a context
        self.kept = 0  # how much the two hold

    def escape(self, text: str) -> str:
        """`text` with a private character for every string that looks like a special token.

        Raises:
            RowError: the text holds such a private character itself.
        """
        private = None if text.isascii() else self.private.search(text)
        if private:
            raise RowError(f"holds the private-use character U+{ord(private[0]):X}, which has no meaning in a text")
        return self.specials.sub(lambda match: self.escape_of[match[0]], text)

    def delimit(self, rendered: str) -> str:
        """What a template wrote around escaped texts: its special tokens as stand-ins, the texts as they were."""
        written = self.specials.sub(lambda match: self.stand_in[match[0]], rendered)
        return self.escaped.sub(lambda match: self.text_of[match[0]], written)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode texts that `delimit` made."""
        return [
            Encoded([self.id_of.get(token, token) for token in encoding.ids], encoding)
            for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def encode_behind(self, texts: Sequence[tuple[str, str]]) -> list[Ids]:
        """The ids of texts, each behind its context, as `encode_after` gives them.

        A word that was met before is not encoded again: the words between the cuts of `align_cli.data.pieces` have
        the same ids everywhere.
        """
        if self.kept > MOST_KEPT:
            self.words, self.starts, self.kept = {}, {}, 0
        pieces = [self.cut.split(text) for _, text in texts]
        starts = [(context, of_text.pop(0)) for (context, _), of_text in zip(texts, pieces, strict=True)]
        self.learn_starts(list(dict.fromkeys(filterfalse(self.starts.__contains__, starts))))
        ids = [list(map(self.words.get, words)) for words in pieces]
        gaps = [place for place, of_text in enumerate(ids) if None in of_text]
        new = (word for place in gaps for word in filterfalse(self.words.__contains__, pieces[place]))
        self.learn_words(list(dict.fromkeys(new)))
        for place in gaps:
            ids[place] = list(map(self.words.get, pieces[place]))
        return [
            np.frombuffer(b"".join([self.starts[start], *filter(None, of_text)]), dtype=np.int32)
            for start, of_text in zip(starts, ids, strict=True)
        ]

    def learn_words(self, words: Sequence[str]) -> None:
        """Encode words behind spaces, many in one text: it is cut between them."""
        inner, last = [], []  # at the end of a text a word may end with what no cut follows
        for word in words:
            (inner if self.cut.match(f"{word} {BEFORE}", len(word)) else last).append(word)
        lines = [inner[start : start + LINE] for start in range(0, len(inner), LINE)] + [[word] for word in last]
        encodings = self.encode([" ".join([BEFORE, *line]) for line in lines])
        for line, encoded in zip(lines, encodings, strict=True):
            borders = [encoded.border(end) for end in accumulate((len(word) + 1 for word in line[:-1]), initial=1)]
            for word, (begin, end) in zip(line, pairwise([*borders, len(encoded.ids)]), strict=True):
                assert begin is not None, f"a token reaches across the space before {word!r}"
                self.words[word] = packed(encoded.ids[begin:end])
                self.kept += len(word) + ENTRY

    def learn_starts(self, starts: Collection[tuple[str, str]]) -> None:
        encodings = self.encode([context + text for context, text in starts])
        for (context, text), encoded in zip(starts, encodings, strict=True):
            border = encoded.border(len(context)) if context else 0
            ids = encoded.ids[border:] if border is not None else self.encode_after(context, text)
            self.starts[context, text] = packed(ids)
            self.kept += len(context) + len(text) + ENTRY

    def context(self, prompt: str) -> str:
        """The end of a prompt that has a say in what follows it."""
        # What stands before a special token has none.
        end = prompt[max((match.start() for match in self.private.finditer(prompt)), default=0) :]
        space = end.rfind(" ")
        while space > 0:
            if self.cut.match(end, space):
                return BEFORE + end[space:]
            space = end.rfind(" ", 0, space)
        return end

    def encode_after(self, context: str, text: str) -> list[int]:
        """The ids of `text` as they are behind `context`, cut off where a token would reach across."""
        # Behind a line end or a full stop no tokenizer adds the space that it adds at the start of a text.
        for before in (context, "\n", ".", ANCHOR):
            [encoded] = self.encode([before + text])
            border = encoded.border(len(before))
            if border is not None:
                return encoded.ids[border:]
        raise AssertionError("a token reaches across an added token")


def standing(character: str, token: AddedToken) -> AddedToken:
    """The stand-in that splits a text as `token` does."""
    return AddedToken(
        character,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )


def number(backend: Tokenizer, token: str) -> int:
    """The id of a token. Raises UserError where there is none."""
    found = backend.token_to_id(token)
    if found is None:
        raise UserError(f"the tokenizer names a special token {token!r} that is not in its vocabulary.")
    return found


class Writer(Protocol):
    """How records become text.

    Attributes:
        last: the special token that ends a response.
    """

    last: str

    def render(self, record: Record) -> Rendered:
        """The text of a record. Raises RowError where it has none."""
        ...

    def lead(self, record: Record) -> str:
        """What is written before every response to the record's prompt, such as a space; part of the response."""
        ...

    @property
    def header(self) -> str:
        """What stands between the end of the last text of a prompt and the response."""
        ...


class TextWriter:
    """Prompt and response joined as they are, then the end-of-sequence token."""

    def __init__(self, codec: Codec, *, stop: str, system: str | None) -> None:
        self.codec, self.stop, self.last, self.system = codec, stop, stop, system

    def lead(self, record: Record) -> str:
        return "" if isinstance(record.prompt, str) else " "

    @property
    def header(self) -> str:
        return ""

    def render(self, record: Record) -> Rendered:
        system = f"{self.system}\n\n" if self.system else ""
        if isinstance(record.prompt, str):
            prompt = system + record.prompt
        else:
            own = any(message["role"] == "system" for message in record.prompt)
            prompt = ("" if own else system) + dialogue(record.prompt)
        escape, delimit, lead = self.codec.escape, self.codec.delimit, self.lead(record)
        responses = tuple(delimit(escape(lead + response) + self.stop) for response in record.responses)
        return Rendered(delimit(escape(prompt)), responses)


def dialogue(messages: Sequence[Message]) -> str:
    """A dialogue as text, up to the response: HH's way of writing."""
    turns = [
        message["content"] + "\n\n"
        if message["role"] == "system"
        else f"{SPEAKERS[message['role']]}: {message['content']}\n\n"
        for message in messages
    ]
    return "".join(turns) + "Assistant:"


class ChatWriter:
    """The tokenizer's chat template.

    Raises:
        UserError: the template does not write a prompt as the beginning of a prompt with its response.
    """

    def __init__(self, codec: Codec, tokenizer: PreTrainedTokenizerBase, *, stop: str, system: str | None) -> None:
        self.codec, self.tokenizer, self.system = codec, tokenizer, system
        self.template = dated(tokenizer.get_chat_template())
        asked = self.opened([{"role": "user", "content": PROBE}])
        try:
            prompt, whole = self.write(asked, answer=None), self.write(asked, answer=PROBE)
        except RowError as error:
            raise UserError(f"{error}. data.system gives a first message; data.template=text does without.") from error
        if not whole.startswith(prompt) or PROBE not in whole[len(prompt) :]:
            raise UserError(
                "the chat template writes a prompt that is not the beginning of the prompt with its response: "
                f"{shown(prompt)} against {shown(whole)}. Give the model's tokenizer a template in which it is, "
                "or set data.template=text."
            )
        self.before = whole[len(prompt) : whole.rindex(PROBE)]
        self.end = whole[whole.rindex(PROBE) + 1 :]
        special = codec.specials.search(self.end)
        self.stop = self.end[: special.end()] if special else stop
        self.last = special[0] if special else stop
        self.after_prompt = prompt[prompt.rindex(PROBE) + 1 :]

    def lead(self, record: Record) -> str:
        return self.before

    @property
    def header(self) -> str:
        return self.codec.delimit(self.after_prompt)

    def opened(self, messages: list[Message]) -> list[Message]:
        """A dialogue with the system message that `data.system` gives to those without one."""
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.codec.escape(self.system)}, *messages]

    def write(self, messages: Sequence[Message], *, answer: str | None) -> str:
        turns = [dict[str, str](role=turn["role"], content=turn["content"]) for turn in messages]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        try:
            written = self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=answer is None
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise RowError(f"the chat template refuses a dialogue of {roles}: {error}") from error
        assert isinstance(written, str)
        return written

    def render(self, record: Record) -> Rendered:
        escape, delimit = self.codec.escape, self.codec.delimit
        messages: list[Message]
        if isinstance(record.prompt, str):
            messages = [{"role": "user", "content": escape(record.prompt)}]
        else:
            messages = [{"role": turn["role"], "content": escape(turn["content"])} for turn in record.prompt]
        messages = self.opened(messages)
        prompt = self.write(messages, answer=None)
        responses = []
        for response in record.responses:
            whole = self.write(messages, answer=escape(response))
            if not whole.startswith(prompt) or not whole.endswith(self.end):
                raise RowError(
                    f"the chat template writes a prompt that is not a prefix of prompt and response: "
                    f"{shown(prompt)} against {shown(whole)}"
                )
            text = whole[len(prompt) : len(whole) - len(self.end)]
            responses.append(delimit(text + self.stop))
        return Rendered(delimit(prompt), tuple(responses))


def dated(template: str) -> str:
    """A chat template that writes `DAY` where it would write today, so that a row has the same tokens tomorrow.

    Raises:
        UserError: it asks for the date in another way.
    """
    fixed = DATED.sub(lambda call: repr(DAY.strftime(call[2])), template)
    if "strftime_now(" in fixed:
        raise UserError(
            "the chat template writes the day on which it is used (strftime_now, without a quoted format), so that a "
            "row would have other tokens tomorrow. Give the model's tokenizer a template with a fixed date, or set "
            "data.template=text."
        )
    return fixed


def shown(text: str, most: int = 80) -> str:
    """The end of a text, for a message."""
    text = text.replace(PROBE, "…")
    return repr(text if len(text) <= most else "…" + text[-most:])


class Template:
    """From records to token ids.

    Args:
        template: chat, text, or auto for chat where the tokenizer has a chat template.
        system: a system message for dialogues without one.

    Attributes:
        stop: the id of the token that ends a response.

    Raises:
        UserError: the tokenizer cannot be used this way.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, template: TemplateName, system: str | None) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise UserError(
                "data.template=chat, but the model's tokenizer has no chat template. Use data.template=text."
            )
        eos = tokenizer.eos_token
        if eos is None:
            raise UserError("the model's tokenizer has no end-of-sequence token: a response could not end.")
        self.codec = Codec(tokenizer)
        self.name = "chat" if tokenizer.chat_template and template != "text" else "text"
        self.writer: Writer = (
            ChatWriter(self.codec, tokenizer, stop=str(eos), system=system)
            if self.name == "chat"
            else TextWriter(self.codec, stop=str(eos), system=system)
        )
        first = backend_of(tokenizer).encode("a").ids[:1]
        self.bos = first[0] if first == [tokenizer.bos_token_id] else None
        self.begin = tokenizer.bos_token_id  # which the tokenizer puts, or the chat template writes
        self.stop = number(backend_of(tokenizer), self.writer.last)
        self.header_tokens = len(self.codec.encode_after(ANCHOR, self.writer.header))

    def tokenise(self, records: Sequence[Record]) -> list[Tokenised | RowError]:
        """The token ids of records, in order; a RowError in the place of one that the template cannot write."""
        rendered: list[Rendered | RowError] = []
        for record in records:
            try:
                rendered.append(self.writer.render(record))
            except RowError as error:
                rendered.append(error)
        good = [one for one in rendered if isinstance(one, Rendered)]
        texts = [("", one.prompt) for one in good]
        texts += [
            (context, text) for one in good for context in [self.codec.context(one.prompt)] for text in one.responses
        ]
        found = iter(self.codec.encode_behind(texts))
        prompts = [self.begun(ids) for ids in islice(found, len(good))]
        made = iter(
            [
                self.given(Tokenised(prompt, tuple(islice(found, len(one.responses)))))
                for one, prompt in zip(good, prompts, strict=True)
            ]
        )
        return [one if isinstance(one, RowError) else next(made) for one in rendered]

    @staticmethod
    def given(group: Tokenised) -> Tokenised | RowError:
        """The group; a RowError where nothing precedes its responses."""
        return group if len(group.prompt) else RowError("the prompt has no token that the tokenizer knows")

    def begun(self, ids: Ids) -> Ids:
        """`ids` with the one begin-of-sequence token that the tokenizer puts."""
        if self.bos is None or ids[:1].tolist() == [self.bos]:
            return ids
        return np.concatenate([np.array([self.bos], dtype=np.int32), ids])

    def shortened(self, prompt: Ids, most: int) -> Ids | None:
        """The end of a prompt, behind its begin-of-sequence token; None where the template's own tokens fill it."""
        begin = prompt[: int(prompt[0] == self.begin)]
        room = most - len(begin)
        return np.concatenate([begin, prompt[-room:]]) if room > self.header_tokens else None


def packed(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all in a tokenizer that decides ids."""
    backend = backend_of(tokenizer)
    special: Mapping[str, object] = tokenizer.special_tokens_map
    parts = [backend.to_str(), json.dumps(tokenizer.chat_template), json.dumps({k: str(v) for k, v in special.items()})]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
