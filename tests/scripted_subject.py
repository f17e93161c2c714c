"""What the tests of evaluations share: a subject that answers what it is told to, and options from the YAMLs."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from align_cli import paths, subject
from align_cli.subject import Generate, Subject


class Scripted:
    """Answers as told, whatever is asked, and keeps what it was asked."""

    tokenizer = SimpleNamespace(chat_template=None)

    def __init__(self, responses: Sequence[Sequence[str]]) -> None:
        self.responses = [list(each) for each in responses]
        self.asked: list[Any] = []
        self.given: dict[str, Any] = {}

    def respond(self, prompts: Sequence[Any], **given: Any) -> list[list[str]]:
        self.asked, self.given = list(prompts), given
        assert len(prompts) == len(self.responses)
        return self.responses


def options_of(name: str, **more: Any) -> dict[str, Any]:
    """The options of an evaluation, as its YAML has them, with others in their place."""
    tree: dict[str, Any] = yaml.safe_load((paths.conf() / "eval" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(more) <= set(tree)
    return {key: value for key, value in {**tree, **more}.items() if key != "name"}


def subject_of(path: Path) -> Subject:
    """A model on the CPU in float32."""
    return subject.find(str(path), Generate(batch=64, seed=0, precision="fp32", accelerator="cpu"))
