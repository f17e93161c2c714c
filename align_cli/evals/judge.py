"""Responses before a judge: rated alone, or compared with a baseline's."""

from collections.abc import Callable, Mapping, Sequence

from align_cli import subject as subjects
from align_cli import verdicts
from align_cli.data import benchmarks, schemas
from align_cli.data.benchmarks import Benchmark
from align_cli.data.fields import one_user
from align_cli.data.records import Message, Record
from align_cli.errors import UserError
from align_cli.evals import Item, Result, Scalar
from align_cli.evals.prompting import Template, resolved
from align_cli.judges import Judge, identity
from align_cli.ranges import Count, NonNegative, NotEmpty
from align_cli.subject import Prompt, Subject
from align_cli.verdicts import Contest, Exhibit, Verdict

DATA = "data"  # the baseline that is the data's own best response


def judge(
    subject: Subject,
    *,
    judge: Judge,
    path: NotEmpty,
    split: NotEmpty,
    baseline: NotEmpty | None,
    limit: Count | None,
    template: Template,
    temperature: NonNegative,
    max_new_tokens: Count,
) -> Result:
    """The mean `rating`, 1 to 10; or, against a baseline, the `win_rate`, where a tie is half a win.

    Args:
        path: a local file or folder of prompts, in any schema of data=file.
        split: of a folder.
        baseline: None rates; `data` compares with the best response of each row; anything else is a run or a model,
            which answers the same prompts.
        limit: at most so many prompts.
        template: chat, text, or auto for chat where the model has a template; of the baseline for itself.
        temperature: of the responses; 0 is the most likely one.
        max_new_tokens: longest response.

    Raises:
        UserError: the prompts cannot be read, or there is no such baseline.
        RunError: the judge cannot be asked further; what it has said is kept.
    """
    data = Benchmark(path=path, hub=None, revision=None, subset=None, split=split, source="prompts")
    labelled, digest = benchmarks.load(data)
    records, _ = benchmarks.read(labelled[:limit], schemas.record)
    dialogues = [_dialogue(record) for record in records]

    def answers_of(answering: Subject) -> list[str]:
        asked = [as_prompt(dialogue, template, answering) for dialogue in dialogues]
        drawn = answering.respond(asked, samples=1, temperature=temperature, max_new_tokens=max_new_tokens)
        return [each[0] for each in drawn]

    others = None if baseline is None else _baseline(baseline, records, subject, answers_of)
    responses = answers_of(subject)
    made: dict[str, Scalar] = {
        "data": data.name,
        "data.digest": digest,
        "baseline": baseline,
        "template": resolved(template, subject),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }
    if others is None:
        return _rated(judge, dialogues, responses, made)
    contests = [Contest(*each) for each in zip(dialogues, responses, others, strict=True)]
    found = verdicts.compare(judge, contests)
    items = [item(str(place), *pair) for place, pair in enumerate(zip(contests, found, strict=True))]
    return Result(items, made={**made, **judged_by(judge, found)}, notes=verdicts.counted(found))


def as_prompt(dialogue: Sequence[Message], template: Template, subject: Subject) -> Prompt:
    """A conversation as a model is asked to go on with it; as a text, its turns are paragraphs."""
    if resolved(template, subject) == "chat":
        return list(dialogue)
    return "".join(f"{turn['content']}\n\n" for turn in dialogue)


def item(name: str, contest: Contest, verdict: Verdict) -> Item:
    """A contest and what became of it."""
    return Item(
        id=name,
        values={"win_rate": verdict.win, "length": float(len(contest.response))},
        shown={
            "dialogue": list(contest.dialogue),
            "response": contest.response,
            "baseline": contest.baseline,
            "outcome": verdict.outcome,
            "judge": [verdicts.shown(answer) for answer in verdict.answers],
        },
    )


def judged_by(judge: Judge, found: Sequence[Verdict]) -> dict[str, str]:
    """Who gave the verdicts."""
    answers = [answer for verdict in found for answer in verdict.answers]
    return identity(judge, answers, verdicts.TEMPLATES["compare"])


def _rated(
    judge: Judge, dialogues: Sequence[Sequence[Message]], responses: Sequence[str], made: Mapping[str, Scalar]
) -> Result:
    exhibits = [
        Exhibit([*dialogue, {"role": "assistant", "content": response}])
        for dialogue, response in zip(dialogues, responses, strict=True)
    ]
    ratings = verdicts.rate(judge, exhibits)
    items = [
        Item(
            id=str(place),
            values={"length": float(len(response)), **({} if rating.value is None else {"rating": rating.value})},
            shown={"dialogue": list(exhibit.dialogue), "judge": verdicts.shown(rating.answer)},
        )
        for place, (exhibit, response, rating) in enumerate(zip(exhibits, responses, ratings, strict=True))
    ]
    who = identity(judge, [rating.answer for rating in ratings], verdicts.TEMPLATES["rate"])
    return Result(items, made={**made, **who}, notes=verdicts.unread(ratings))


def _dialogue(record: Record) -> tuple[Message, ...]:
    return one_user(record.prompt) if isinstance(record.prompt, str) else record.prompt


def _baseline(
    name: str, records: Sequence[Record], subject: Subject, answers_of: Callable[[Subject], list[str]]
) -> list[str]:
    if name != DATA:
        return answers_of(subjects.find(name, subject.options))
    bare = [record.where for record in records if not record.responses]
    if bare:
        raise UserError(f"eval.baseline=data: row {bare[0]} has no response; use rows with responses, or a run.")
    return [max(zip(record.ratings, record.responses, strict=True))[1] for record in records]
