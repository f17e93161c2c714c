"""Mathematical questions with one right answer: GSM8K, GSM-Plus, MATH, TheoremQA, SVAMP, ASDiv, and files like them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from align_cli import terminal
from align_cli.answers import Checker, Judgement, extract
from align_cli.config import find
from align_cli.data import benchmarks
from align_cli.data.benchmarks import Benchmark, Question, Subsets
from align_cli.data.records import Message
from align_cli.data.rows import has_splits
from align_cli.errors import UserError
from align_cli.evals import Item, Result
from align_cli.evals.prompting import Template, resolved
from align_cli.ranges import Count, NonNegative, NotEmpty, Positive, WholeNumber
from align_cli.subject import Prompt, Subject

Rule = Literal["boxed", "marked", "said", "number"]


def mathematics(
    subject: Subject,
    *,
    path: NotEmpty | None,
    hub: NotEmpty | None,
    revision: NotEmpty | None,
    subset: Subsets,
    split: NotEmpty,
    source: NotEmpty,
    rows: Literal["gsm8k", "gsm_plus", "math", "theoremqa", "svamp", "asdiv"],
    limit: Count | None,
    shots: WholeNumber,
    shots_split: NotEmpty | None,
    template: Template,
    prompt: NotEmpty,
    stop: list[NotEmpty],
    samples: Count,
    temperature: NonNegative,
    max_new_tokens: Count,
    extract_by: list[Rule],
    tolerance: NonNegative,
    seconds: Positive,
) -> Result:
    """The share of right answers, `accuracy`, and of responses with any answer, `answered`.

    Args:
        path, hub, revision, subset, split, source: where the questions are (`align_cli.data.benchmarks.Benchmark`).
        rows: the schema of a row.
        limit: at most so many questions.
        shots: questions with their solutions that stand before each question.
        shots_split: where those are; None, or a single file: the first rows of the questions themselves, which are
            then not asked.
        template: chat, text, or auto for chat where the model has a template.
        prompt: what is asked, with the question in the place of {question}.
        stop: texts that end a response.
        samples: responses to each question.
        temperature: of them; 0 is the most likely response.
        max_new_tokens: longest response.
        extract_by: how the answer is found in a response; the first rule that finds one counts.
        tolerance: how far a number may be off, relative to the right one.
        seconds: longest time to judge an answer.

    Raises:
        UserError: the questions are not at hand, or a row cannot be read.
    """
    if "{question}" not in prompt:
        raise UserError(f"eval.prompt={prompt!r}: give a text with {{question}} in it.")
    reader = find("align_cli.data.benchmarks", rows, "eval", told="rows")
    data = Benchmark(path=path, hub=hub, revision=revision, subset=subset, split=split, source=source)
    labelled, digest = benchmarks.load(data)
    questions, left_out = benchmarks.read(labelled, reader)
    examples, questions = _examples(data, questions, reader, shots, shots_split, rows)
    questions = questions[:limit]
    if not questions:
        raise UserError(f"{data.name} has no question to ask beside {len(examples)} examples.")
    kind = resolved(template, subject)
    asked = [_asked(each, examples, prompt, kind) for each in questions]
    with Checker(seconds=seconds) as checker:
        drawn = subject.respond(
            asked, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens, stop=stop
        )
        items: list[Item] = []
        counts: Counter[Judgement] = Counter()
        with terminal.counter() as progress:
            for question, prompted, responses in zip(questions, asked, drawn, strict=True):
                found = [extract(response, extract_by) for response in responses]
                judged: list[Judgement] = [
                    checker.judge(question.gold, each, shape=question.shape, tolerance=tolerance) for each in found
                ]
                counts.update(judged)
                items.append(_item(question, prompted, responses, found, judged))
                progress("judging", len(items), len(questions))
        made = {
            "data": data.name,
            "data.digest": digest,
            "shots": shots,
            "template": kind,
            "temperature": temperature,
            "samples": samples,
            "max_new_tokens": max_new_tokens,
            "extracted by": ", ".join(extract_by),
            "grader": checker.version,
        }
    return Result(items, made=made, notes=_notes(counts, left_out))


def _examples(
    data: Benchmark,
    questions: list[Question],
    reader: Callable[..., Question | None],
    shots: int,
    split: str | None,
    rows: str,
) -> tuple[list[Question], list[Question]]:
    """The examples and the questions to ask."""
    if shots == 0:
        return [], questions
    own = split is None or (data.path is not None and not has_splits(data.path))
    if own:
        examples, questions = questions[:shots], questions[shots:]
    else:
        assert split is not None
        there, _ = benchmarks.load(replace(data, split=split))
        examples, _ = benchmarks.read(there[:shots], reader)
    if len(examples) < shots:
        raise UserError(f"eval.shots={shots}: {data.name} has {len(examples)} examples.")
    unsolved = [each.id for each in examples if each.solution is None]
    if unsolved:
        raise UserError(f"eval.shots={shots}: {rows} has no worked solutions to show; use eval.shots=0.")
    return examples, questions


def _asked(question: Question, examples: list[Question], prompt: str, kind: Literal["chat", "text"]) -> Prompt:
    """The question behind the examples: turns of a chat, or one text."""
    told = [(prompt.replace("{question}", each.asked), each.solution or "") for each in examples]
    last = prompt.replace("{question}", question.asked)
    if kind == "text":
        return "".join(f"{asked} {solution}\n\n" for asked, solution in told) + last
    turns: list[Message] = []
    for asked, solution in told:
        turns += [Message(role="user", content=asked), Message(role="assistant", content=solution)]
    return [*turns, Message(role="user", content=last)]


def _item(
    question: Question, prompted: Prompt, responses: list[str], found: list[str | None], judged: list[Judgement]
) -> Item:
    return Item(
        id=question.id,
        values={
            "accuracy": judged.count("right") / len(judged),
            "answered": sum(each != "unread" for each in judged) / len(judged),
        },
        shown={
            "prompt": prompted,
            "gold": ", ".join(question.gold),
            "responses": responses,
            "answers": found,
            "judged": judged,
        },
    )


def _notes(counts: Counter[Judgement], left_out: int) -> list[str]:
    notes: list[str] = []
    total = sum(counts.values())
    if counts["unread"]:
        notes.append(f"{counts['unread']} of {total} responses have no answer that could be read; they count as wrong.")
    if counts["given up"]:
        notes.append(f"{counts['given up']} of {total} answers took too long to judge; they count as wrong.")
    if left_out:
        notes.append(f"{left_out} questions that have no answer are left out.")
    return notes
