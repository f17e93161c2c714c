"""Whether a benchmark's questions are asked in a chat or as a text that the model goes on with."""

from typing import Literal

from align_cli.subject import Subject

Template = Literal["auto", "chat", "text"]


def resolved(template: Template, subject: Subject) -> Literal["chat", "text"]:
    """`auto` is a chat where the model's tokenizer has a chat template."""
    if template == "auto":
        return "chat" if subject.tokenizer.chat_template else "text"
    return template
