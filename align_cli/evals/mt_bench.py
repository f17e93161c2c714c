"""MT-bench: conversations of two turns, each answer rated by a judge. L. Zheng et al., arXiv 2306.05685.

The second turn follows the model's own first answer. Departures: the judge's prompt is our own (`align_cli.verdicts`),
and right answers are those that stand with the questions, not those that GPT-4 gave.
"""

from collections.abc import Sequence

from align_cli import verdicts
from align_cli.data import benchmarks, conversations
from align_cli.data.benchmarks import Benchmark
from align_cli.data.conversations import Talk
from align_cli.data.records import Message
from align_cli.evals import Item, Result
from align_cli.evals.judge import as_prompt
from align_cli.evals.prompting import Template, resolved
from align_cli.judges import Judge, identity
from align_cli.ranges import Count, NonNegative, NotEmpty
from align_cli.subject import Subject
from align_cli.verdicts import Exhibit, Rating

# As FastChat samples: what should vary, and what has one answer.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
REFERRED = ("math", "reasoning", "coding")  # categories whose judge sees a right answer


def mt_bench(
    subject: Subject,
    *,
    judge: Judge,
    path: NotEmpty | None,
    hub: NotEmpty | None,
    revision: NotEmpty | None,
    subset: NotEmpty | None,
    split: NotEmpty,
    source: NotEmpty,
    limit: Count | None,
    template: Template,
    temperature: NonNegative | None,
    max_new_tokens: Count,
) -> Result:
    """The mean rating, `score`, 1 to 10; of each turn, `turn_1`, `turn_2`; and of each category.

    Args:
        path, hub, revision, subset, split, source: where the questions are (`align_cli.data.benchmarks.Benchmark`).
        limit: at most so many questions.
        template: chat, text, or auto for chat where the model has a template.
        temperature: of the answers; None: by category, as FastChat samples them.
        max_new_tokens: longest answer.

    Raises:
        UserError: the questions are not at hand, or a row cannot be read.
        RunError: the judge cannot be asked further; what it has said is kept.
    """
    data = Benchmark(path=path, hub=hub, revision=revision, subset=subset, split=split, source=source)
    labelled, digest = benchmarks.load(data)
    talks, _ = benchmarks.read(labelled[:limit], conversations.mt_bench)
    warmth = [TEMPERATURES.get(talk.category, 0.0) if temperature is None else temperature for talk in talks]
    held = converse(subject, talks, warmth, template, max_new_tokens)
    exhibits = [
        Exhibit(dialogue[: 2 * turn + 2], talk.references[turn] if referred(talk) else None)
        for talk, dialogue in zip(talks, held, strict=True)
        for turn in range(len(talk.turns))
    ]
    ratings = verdicts.rate(judge, exhibits)
    left = iter(ratings)
    items = [
        _item(talk, dialogue, [next(left) for _ in talk.turns]) for talk, dialogue in zip(talks, held, strict=True)
    ]
    made = {
        "data": data.name,
        "data.digest": digest,
        "template": resolved(template, subject),
        "temperature": "by category" if temperature is None else temperature,
        "max_new_tokens": max_new_tokens,
        **identity(judge, [rating.answer for rating in ratings], verdicts.TEMPLATES["rate"]),
    }
    return Result(items, made=made, notes=verdicts.unread(ratings))


def referred(talk: Talk) -> bool:
    """Whether the judge is shown a right answer."""
    return talk.category in REFERRED and bool(talk.references)


def converse(
    subject: Subject, talks: Sequence[Talk], warmth: Sequence[float], template: Template, max_new_tokens: int
) -> list[list[Message]]:
    """The whole conversations: each turn of a user is answered by the model before the next one comes."""
    held: list[list[Message]] = [[] for _ in talks]
    for turn in range(max((len(talk.turns) for talk in talks), default=0)):
        for temperature in sorted(set(warmth)):
            places = [
                place for place, talk in enumerate(talks) if turn < len(talk.turns) and warmth[place] == temperature
            ]
            for place in places:
                held[place].append({"role": "user", "content": talks[place].turns[turn]})
            asked = [as_prompt(held[place], template, subject) for place in places]
            drawn = subject.respond(asked, samples=1, temperature=temperature, max_new_tokens=max_new_tokens)
            for place, [answer] in zip(places, drawn, strict=True):
                held[place].append({"role": "assistant", "content": answer})
    return held


def _item(talk: Talk, dialogue: Sequence[Message], ratings: Sequence[Rating]) -> Item:
    given = {f"turn_{turn}": rating.value for turn, rating in enumerate(ratings, 1) if rating.value is not None}
    score = sum(given.values()) / len(given) if given else None
    means = {} if score is None else {"score": score, talk.category: score}
    return Item(
        id=talk.id,
        values={**means, **given},
        shown={
            "category": talk.category,
            "dialogue": list(dialogue),
            "judge": [verdicts.shown(rating.answer) for rating in ratings],
        },
    )
