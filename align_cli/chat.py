"""A conversation with a model: what was said so far, and an answer that is shown as it is written."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from align_cli import generation
from align_cli.data.records import Message
from align_cli.errors import UserError
from align_cli.ranges import Count, NonNegative, NotEmpty, WholeNumber
from align_cli.responses import Response, digest_of
from align_cli.subject import Generate, Prompt, Subject

CUT = "\ufffd"  # stands for bytes of a character of which others are still to come


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model answers; the keys are explained in conf/chat.yaml."""

    temperature: NonNegative
    max_new_tokens: Count
    system: NotEmpty | None
    seed: WholeNumber | None
    precision: Literal["auto", "fp32", "bf16"]
    accelerator: Literal["auto", "cpu", "gpu"]

    def generate(self) -> Generate:
        """The same for a subject; without a seed, another one each time."""
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return Generate(batch=1, seed=seed, precision=self.precision, accelerator=self.accelerator)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model has answered.

    Attributes:
        ended: whether it ended by itself or was stopped, and not because it was cut at `max_new_tokens`.
    """

    text: str
    tokens: int
    ended: bool


class Speaker:
    """A model in a conversation, with its own memory of it.

    A model with a chat template remembers its turns; one without goes on with each text by itself, as it is.

    Raises:
        UserError: it is a reward model, or has no system message where one is given.
    """

    def __init__(self, subject: Subject, options: Options) -> None:
        subject.refuse_reward_model()
        self.subject = subject
        self.options = options
        self.turns: list[Message] = []
        self.answers = 0
        self.begin(options.system)

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return bool(self.subject.tokenizer.chat_template)

    def begin(self, system: str | None) -> None:
        """Forget what was said, and begin with a system message or none.

        Raises:
            UserError: it cannot have one; nothing is forgotten.
        """
        if system is not None and not self.chats:
            raise UserError(f"{self.subject.name}: it has no chat template, and with it no system message.")
        turns = [] if system is None else [Message(role="system", content=system)]
        self.subject.encode([[*turns, Message(role="user", content="?")] if self.chats else "?"])
        self.turns = turns

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self.turns = [turn for turn in self.turns if turn["role"] == "system"]

    def answer(self, said: str, show: Callable[[str], bool]) -> Answer:
        """Answer, and remember what was said and answered.

        With the same seed the first answer of a conversation is the first of `align sample` to the same prompt.

        Args:
            show: is given what is new of the answer after each token; True stops the answer there.

        Raises:
            UserError: what is said cannot be written, or leaves no room for an answer; it is not remembered.
        """
        prompt: Prompt = [*self.turns, Message(role="user", content=said)] if self.chats else said
        [encoded] = self.subject.encode([prompt])
        ids = encoded.tolist()
        eos_ids = self.subject.ends([self.subject.template(prompt).stop])
        shown = 0

        def text_of(tokens: list[int], ended: bool) -> str:
            [found] = self.subject.texts(ids, [Response(tokens, ended, 0.0)])
            return found.text

        def halted(responses: list[list[int]]) -> list[bool]:
            nonlocal shown
            text = text_of(responses[0], False).rstrip(CUT)
            new, shown = text[shown:], max(shown, len(text))
            return [show(new)]

        [(_, [drawn])] = generation.sample(
            self.subject.model,
            [ids],
            responses=1,
            max_new_tokens=self._room(len(ids)),
            temperature=self.options.temperature,
            seeds=[(self.subject.options.seed, int(digest_of(ids), 16))],
            batch=1,
            pad_id=eos_ids[0],
            eos_ids=eos_ids,
            first=self.answers,
            halted=halted,
            look=1,
        )
        text = text_of(drawn.tokens, drawn.ended)
        show(text[shown:])
        self.answers += 1
        if self.chats:
            self.turns += [Message(role="user", content=said), Message(role="assistant", content=text)]
        return Answer(text, len(drawn.tokens), drawn.ended)

    def _room(self, tokens: int) -> int:
        """The most tokens of an answer behind so many."""
        positions = self.subject.positions
        if positions is None:
            return self.options.max_new_tokens
        if tokens >= positions:
            raise UserError(
                f"{self.subject.name}: all that was said has {tokens:,} tokens, and the model {positions:,} positions; "
                "/reset begins anew."
            )
        return min(self.options.max_new_tokens, positions - tokens)
