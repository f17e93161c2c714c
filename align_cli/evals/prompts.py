"""Held-out prompts of a run's own data, or of data that the command line names, and samples for them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from align_cli import config, paths, raters, reading, rundir, terminal
from align_cli.config import Tree
from align_cli.data.options import Data
from align_cli.data.store import Group, Store
from align_cli.data.store import prepare as prepare_data
from align_cli.data.tokens import Template
from align_cli.errors import UserError
from align_cli.evals import Training
from align_cli.experiment import Experiment
from align_cli.raters import ByModel, ByProgram, Ensemble, FromEnsemble, Models, Rater, Scorer
from align_cli.references import content
from align_cli.responses import Response
from align_cli.run import prepare
from align_cli.sections import RATERS
from align_cli.subject import BUDGET, Subject, find, start_of

START = "start"  # names the model that a run has started from


@dataclass(frozen=True)
class HeldOut:
    """Held-out groups, in the order of the data.

    Attributes:
        data: the section.
        experiment: the run, or what the command line describes; None for a model that is not a run, where only
            prompts matter.
        groups: of the data's own responses, where these matter and the run does not sample its own.
        stop: the token that ends a response as the data's template writes it.
    """

    data: Data
    experiment: Experiment | None
    groups: list[Group]
    stop: int

    @property
    def made(self) -> dict[str, rundir.Scalar]:
        """What is said of the data with a result; which rows they are, the names of the items tell (`ids`)."""
        return {"data": self.data.path, "template": self.data.template}

    @property
    def reference(self) -> str:
        """The model to compare with where none is named: the one that the run has named, or has started from."""
        return (self.experiment.reference.path if self.experiment is not None else None) or START


def held_out(subject: Subject, training: Training, *, limit: int | None, responses: bool) -> HeldOut:
    """The held-out groups of the subject's data.

    Args:
        limit: at most so many.
        responses: whether the data's own responses matter.

    Raises:
        UserError: a model that is not a run needs data; or nothing is held out.
    """
    if subject.config is None and "data" not in training.sections:
        raise UserError(
            f"{subject.name}: a model that is not a run has no data of its own; use data=file data.path=FILE, or "
            "another choice of `align ls data`."
        )
    if subject.config is None and not responses:
        read, store, data = None, *_prompts(subject, training)
    else:
        prepared = prepare(reading.read(tree_of(subject, training)))
        read, store, data = prepared.experiment, prepared.held_out, prepared.experiment.data
    groups = [store[index] for index in range(min(len(store), limit or len(store)))]
    if not groups:
        raise UserError(f"data={data.name}: no rows are held out; data.held_out=N, or another file.")
    stop = Template(subject.tokenizer, template=data.template, system=data.system).stop
    return HeldOut(data, read, groups, stop)


def _prompts(subject: Subject, training: Training) -> tuple[Store, Data]:
    """The held-out prompts of data that the command line names."""
    section = {**config.compose("train", ["model=tiny", "data=file"])["data"], **training.sections["data"]}
    problems = config.check(Data, section, "data")
    if problems:
        raise UserError("\n".join(problems))
    data = config.build(Data, section)
    _, found = prepare_data(
        data,
        subject.tokenizer,
        seed=0,
        cache=paths.cache() / "data",
        say=terminal.say,
        pairwise=False,
        strict=False,
        sampled=1,
    )
    return found, data


def tree_of(subject: Subject, training: Training) -> Tree:
    """The configuration that a run was trained by, or that a model's would be, with what the command line names.

    Without an algorithm, a model that is not a run imitates the best response of each prompt.
    """
    if subject.config is None:
        path = config.quoted(subject.base.path)
        tree = config.compose(
            "train", ["algo=sft", "model=hf", f"model.path={path}", "data=file", "data.path=none", "run.dir=none"]
        )
    else:
        tree = dict(subject.config)
    for name in ("data", "algo"):
        section = training.sections.get(name, {})
        tree[name] = section if "name" in section else {**tree[name], **section}
    if subject.config is None and "algo" not in training.sections:
        tree["data"] = {**tree["data"], "responses": 1}
    return tree


def ids(groups: Sequence[Group]) -> list[str]:
    """A name for each group: its prompt's, so that runs which keep other responses of it are compared prompt by prompt.

    Where a prompt comes several times, its responses tell the groups apart, and then a number.
    """
    prompts = Counter(group.prompt.tobytes() for group in groups)
    seen = Counter[str]()
    found: list[str] = []
    for group in groups:
        prompt = group.prompt.tobytes()
        parts = [prompt, *(content(group) if prompts[prompt] > 1 else [])]
        name = hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found


@dataclass(frozen=True)
class Drawn:
    """Samples for held-out prompts.

    Attributes:
        groups: the prompts with the samples for responses, in the order of the data.
        responses: the same samples with what the sampler says of them.
        texts: of the prompts, without special tokens, and of the samples.
        max_new_tokens: the longest that a sample could be.
    """

    groups: list[Group]
    responses: list[list[Response]]
    prompts: list[str]
    texts: list[list[str]]
    max_new_tokens: int


def drawn(subject: Subject, asked: HeldOut, *, samples: int, temperature: float, max_new_tokens: int) -> Drawn:
    """`samples` responses of the subject to each prompt."""
    prompts = [group.prompt.tolist() for group in asked.groups]
    most = subject.room(prompts, max_new_tokens)
    found = subject.draw(
        prompts, samples=samples, temperature=temperature, max_new_tokens=most, stop=[], stops=[asked.stop]
    )
    groups = [answered(group, responses) for group, responses in zip(asked.groups, found, strict=True)]
    prompt_texts, texts = written(subject, groups)
    return Drawn(groups, found, prompt_texts, texts, most)


def answered(group: Group, responses: Sequence[Response]) -> Group:
    """The prompt of a group with these responses, which nobody has rated."""
    return Group(
        index=group.index,
        prompt=group.prompt,
        responses=tuple(np.array(each.tokens, dtype=np.int32) for each in responses),
        ratings=np.zeros(len(responses), dtype=np.float32),
        where=group.where,
    )


def written(subject: Subject, groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Prompts and responses as text, without special tokens."""
    decode = subject.tokenizer.batch_decode
    prompts = decode([group.prompt.tolist() for group in groups], skip_special_tokens=True)
    responses = [
        decode([each.tolist() for each in group.responses], skip_special_tokens=True) if group.responses else []
        for group in groups
    ]
    return prompts, responses


def start(subject: Subject) -> Subject:
    """The model that a run has started from.

    Raises:
        UserError: the subject is not a run.
    """
    if subject.config is None:
        raise UserError(f"{subject.name}: not a run, so that nothing says what it started from; use a model's name.")
    revision = subject.config["model"]["revision"]
    return Subject(START, start_of(subject.config), options=subject.options, revision=revision)


def named(subject: Subject, name: str, key: str) -> Subject:
    """Another run or model, `start` for the one that the subject's run has started from; it has the same tokens."""
    other = start(subject) if name == START else find(name, subject.options)
    subject.refuse_other_tokens(other, key)
    return other


def scorer_in(section: Tree) -> Scorer | Models:
    """What the section `scorer` describes.

    Raises:
        UserError: what is wrong with it.
    """
    name = str(section.get("name"))
    made = RATERS.get(name) or config.find("align_cli.scorers", name, "scorer")
    options = section if name in RATERS else {key: value for key, value in section.items() if key != "name"}
    problems = config.check(made, options, "scorer")
    if problems:
        raise UserError("\n".join(problems))
    return config.build(made, options)


def rater(subject: Subject, section: Tree) -> Rater:
    """Who rates the samples: a program of texts, a reward model, or several.

    Raises:
        UserError: what is wrong with the section, or a reward model reads other tokens.
    """
    scorer = scorer_in(section)
    if not isinstance(scorer, Models):
        raters.load(scorer)
        return ByProgram(scorer, subject.tokenizer)
    members = [_reward_model(subject, path) for path in scorer.paths]
    if not isinstance(scorer, FromEnsemble):
        return members[0]
    return Ensemble(members, scorer.aggregate, scorer.caution)


def _reward_model(subject: Subject, path: str) -> Rater:
    model = find(path, subject.options)
    if not model.is_reward_model:
        raise UserError(f"scorer: {path} is not a reward model; algo=bradley_terry makes one.")
    subject.refuse_other_tokens(model, "scorer")
    return ByModel(model.model, model.manner, model.device, BUDGET, visits=False)


def rated(rate: Rater, groups: Sequence[Group]) -> list[list[float] | None]:
    """The ratings of each group's responses; None where one has none."""
    return [each.ratings.astype(np.float64).tolist() if isinstance(each, Group) else None for each in rate(groups)]


def tell_cut(responses: Iterable[Sequence[Response]]) -> list[str]:
    """A note on the responses that did not end by themselves."""
    every = [each for drawn in responses for each in drawn]
    cut = sum(not each.ended for each in every)
    return [f"{cut} of {len(every)} responses did not end within max_new_tokens"] if cut else []
