"""Benchmarks of conversations: MT-bench's questions, AlpacaEval's instructions, RewardBench's pairs."""

from dataclasses import dataclass

from align_cli.data.fields import field, items, one_user, prompt_of, text
from align_cli.data.records import Message, Row, RowError


@dataclass(frozen=True, slots=True)
class Talk:
    """What a user says, turn by turn, whatever is answered.

    Attributes:
        turns: at least one.
        references: a right answer to each turn, or none at all.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction with the baseline's answer."""

    id: str
    dialogue: tuple[Message, ...]
    baseline: str
    generator: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Two answers to one prompt, of which the first is better."""

    id: str
    subset: str
    dialogue: tuple[Message, ...]
    chosen: str
    rejected: str


def mt_bench(row: Row, place: str) -> Talk:
    """question_id, category, turns, reference as FastChat has them; or prompt_id and prompt. arXiv 2306.05685."""
    turns = items(field(row, "turns" if "turns" in row else "prompt"), "turns")
    told = items(row.get("reference") or [], "reference")
    references = tuple(text(each, "reference") for each in told)
    if not turns or (references and len(references) != len(turns)):
        raise RowError(f"{len(turns)} turns with {len(references)} references: a reference for each turn, or none")
    name = str(row.get("question_id") or row.get("prompt_id") or place)
    return Talk(
        name, text(field(row, "category"), "category"), tuple(text(turn, "a turn") for turn in turns), references
    )


def alpaca_eval(row: Row, place: str) -> Instruction:
    """instruction, output, generator: the outputs of a model in alpaca_eval's files."""
    asked = text(field(row, "instruction"), "instruction")
    return Instruction(place, one_user(asked), text(field(row, "output"), "output"), str(row.get("generator") or ""))


def rewardbench(row: Row, place: str) -> Choice:
    """prompt, chosen, rejected, subset, id. arXiv 2403.13787."""
    prompt = prompt_of(field(row, "prompt"))
    return Choice(
        str(row.get("id") or place),
        text(field(row, "subset"), "subset"),
        one_user(prompt) if isinstance(prompt, str) else prompt,
        text(field(row, "chosen"), "chosen"),
        text(field(row, "rejected"), "rejected"),
    )
