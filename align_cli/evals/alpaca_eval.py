"""AlpacaEval: how often a judge prefers a model's answers to a baseline's. X. Li et al., and arXiv 2404.04475.

Departures: the judge is asked in both orders for a verdict in words (`align_cli.verdicts`), where AlpacaEval 2 asks in
one random order and reads the probability of one token; the length-controlled win rate is that of
`align_cli.length_control`.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align_cli import length_control, verdicts
from align_cli.config import did_you_mean
from align_cli.data import annotations, benchmarks, conversations
from align_cli.data.annotations import Published
from align_cli.data.benchmarks import Benchmark
from align_cli.errors import UserError
from align_cli.evals import Item, Result, Scalar
from align_cli.evals.judge import as_prompt, item, judged_by
from align_cli.evals.prompting import Template, resolved
from align_cli.judges import Judge
from align_cli.length_control import Array
from align_cli.ranges import Count, NonNegative, NotEmpty, Positive
from align_cli.subject import Subject
from align_cli.verdicts import Contest

COLUMN = "instruction_difficulty"  # of the authors' instruction_difficulty.csv
WITHOUT = (
    "length-controlled without the difficulty of instructions (eval.difficulty), which published figures have; those "
    "may differ by several points."
)


@dataclass(frozen=True)
class Compared:
    """What the win rates are made of: preferences over the baseline, and lengths in characters where both are known.

    Attributes:
        places: of the instructions in the benchmark.
    """

    instructions: Sequence[str]
    places: Sequence[int]
    wins: Array
    lengths: tuple[Array, Array] | None


def alpaca_eval(
    subject: Subject,
    *,
    judge: Judge | None,
    path: NotEmpty | None,
    hub: NotEmpty | None,
    revision: NotEmpty | None,
    subset: NotEmpty | None,
    split: NotEmpty,
    source: NotEmpty,
    annotations: NotEmpty | None,
    generator: NotEmpty | None,
    difficulty: NotEmpty | None,
    ridge: Positive,
    limit: Count | None,
    template: Template,
    temperature: NonNegative,
    max_new_tokens: Count,
) -> Result:
    """The share of wins, `win_rate`, a tie half of one; and `length_controlled_win_rate`.

    Args:
        path, hub, revision, subset, split, source: where instructions with the baseline's outputs are.
        annotations: published preferences, whose win rates are computed again; nothing is generated or judged.
        generator: the model of that file that is meant; None: the file has one alone.
        difficulty: the authors' table of the difficulty of instructions, or annotations of several other models, to
            which it is fitted; None leaves it out.
        ridge: the L2 penalty of each coefficient of the length-controlled model; larger draws them to 0.
        limit: at most so many instructions.
        template: chat, text, or auto for chat where the model has a template.
        temperature: of the answers; 0 is the most likely one.
        max_new_tokens: longest answer.

    Raises:
        UserError: a file is not at hand or cannot be read, or there is neither a judge nor a file of preferences.
        RunError: the judge cannot be asked further; what it has said is kept.
    """
    if annotations is not None:
        found, made = _published(annotations, generator, limit)
        items = [_item(each) for each in found]
        compared = _compared(found)
        notes = [] if compared.lengths else ["the file has no outputs of the baseline: nothing is length-controlled."]
    elif judge is None:
        raise UserError(
            "eval=alpaca_eval asks a judge, and none is named; use judge=openai judge.model=MODEL, or "
            "eval.annotations=FILE for preferences that are published."
        )
    else:
        data = Benchmark(path=path, hub=hub, revision=revision, subset=subset, split=split, source=source)
        labelled, digest = benchmarks.load(data)
        asked, _ = benchmarks.read(labelled[:limit], conversations.alpaca_eval)
        prompts = [as_prompt(each.dialogue, template, subject) for each in asked]
        drawn = subject.respond(prompts, samples=1, temperature=temperature, max_new_tokens=max_new_tokens)
        contests = [Contest(each.dialogue, one, each.baseline) for each, [one] in zip(asked, drawn, strict=True)]
        said = verdicts.compare(judge, contests)
        items = [item(each.id, one, verdict) for each, one, verdict in zip(asked, contests, said, strict=True)]
        lengths = _lengths([each.response for each in contests]), _lengths([each.baseline for each in contests])
        names = [each.dialogue[-1]["content"] for each in asked]
        compared = Compared(names, range(len(names)), np.array([verdict.win for verdict in said]), lengths)
        made = {
            "data": data.name,
            "data.digest": digest,
            "baseline": "+".join(sorted({each.generator for each in asked})),
            "template": resolved(template, subject),
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            **judged_by(judge, said),
        }
        notes = verdicts.counted(said)
    figures: Mapping[str, float] = {}
    if compared.lengths is not None:
        figures = _controlled(compared, difficulty, ridge)
        made |= {"difficulty": difficulty, "ridge": ridge}
        notes = [*notes, *([WITHOUT] if difficulty is None else [])]
    return Result(items, figures=figures, made=made, notes=notes)


def _lengths(texts: Sequence[str]) -> Array:
    return np.array([len(text) for text in texts], dtype=np.float64)


def _controlled(compared: Compared, difficulty: str | None, ridge: float) -> dict[str, float]:
    assert compared.lengths is not None
    gamma = None if difficulty is None else difficulty_of(difficulty, compared.instructions, compared.places, ridge)
    feature = length_control.length_feature(*compared.lengths)
    rate = length_control.controlled(compared.wins, feature, gamma, ridge=ridge)
    name = "length_controlled_win_rate"
    return {name: rate.estimate, f"{name}_low": rate.low, f"{name}_high": rate.high}


# --- published preferences


def _published(path: str, generator: str | None, limit: int | None) -> tuple[list[Published], dict[str, Scalar]]:
    whole, digest = annotations.read(path, key="eval.annotations")
    models = list(dict.fromkeys(each.model for each in whole))
    if generator is None and len(models) != 1:
        raise UserError(f"eval.annotations={path}: of {', '.join(models)}; eval.generator=NAME says which is meant.")
    chosen = models[0] if generator is None else generator
    if chosen not in models:
        raise UserError(
            f"eval.generator={chosen}: not in {path}.{did_you_mean(chosen, models)} It has {', '.join(models)}."
        )
    found = [each for each in whole if each.model == chosen][:limit]
    baselines = sorted({each.baseline for each in found if each.baseline is not None})
    return found, {
        "data": path,
        "data.digest": digest,
        "generator": chosen,
        "baseline": "+".join(baselines) or "as published",
        "judge": "as published",
    }


def _item(each: Published) -> Item:
    return Item(
        id=each.prompt,
        values={"win_rate": each.win, "length": float(len(each.response))},
        shown={"dialogue": list(each.dialogue), "response": each.response, "baseline": each.other},
    )


def _compared(found: Sequence[Published]) -> Compared:
    wins = np.array([each.win for each in found])
    others = [each.other for each in found if each.other is not None]
    names, places = [each.dialogue[-1]["content"] for each in found], [each.order for each in found]
    if len(others) < len(found):
        return Compared(names, places, wins, None)
    return Compared(names, places, wins, (_lengths([each.response for each in found]), _lengths(others)))


# --- how difficult an instruction is


def difficulty_of(path: str, instructions: Sequence[str], places: Sequence[int], ridge: float) -> Array:
    """γ of each instruction: from the authors' table by place, or fitted to annotations of several models by text.

    Raises:
        UserError: the file has too few, or is of another schema.
    """
    found = _table(path) if path.endswith(".csv") else _fitted(path, ridge)
    keys = [str(place) for place in places] if path.endswith(".csv") else instructions
    absent = [key for key in keys if key not in found]
    if absent:
        raise UserError(f"eval.difficulty={path}: nothing on {len(absent)} instructions, the first is {absent[0]!r}.")
    return np.array([found[key] for key in keys])


def _table(path: str) -> dict[str, float]:
    try:
        with open(Path(path).expanduser(), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {str(place): float(row[COLUMN]) for place, row in enumerate(rows)}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"eval.difficulty={path}: {error}; give a table with the column {COLUMN}, a number for each instruction in "
            "the order of the benchmark."
        ) from error


def _fitted(path: str, ridge: float) -> dict[str, float]:
    whole, _ = annotations.read(path, key="eval.difficulty")
    by_model: dict[str, dict[str, Published]] = {}
    for each in whole:
        if each.other is not None:
            by_model.setdefault(each.model, {})[each.dialogue[-1]["content"]] = each
    if len(by_model) < 2:
        raise UserError(f"eval.difficulty={path}: annotations of {len(by_model)} models; give two or more.")
    shared = sorted(set.intersection(*(set(each) for each in by_model.values())))
    wins, features = [], []
    for each in by_model.values():
        compared = _compared([each[instruction] for instruction in shared])
        assert compared.lengths is not None
        wins.append(compared.wins)
        features.append(length_control.length_feature(*compared.lengths))
    gamma = length_control.difficulties(np.stack(wins), np.stack(features), ridge=ridge)
    return dict(zip(shared, gamma.tolist(), strict=True))
