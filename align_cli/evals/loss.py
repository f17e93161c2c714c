"""The loss and all metrics of training, on held-out data."""

from align_cli import columns
from align_cli.data.store import Group
from align_cli.errors import UserError
from align_cli.evals import Item, Result, Training, prompts
from align_cli.evals.prompts import START, HeldOut
from align_cli.evaluate import figures_of_each, flat, measured_parts
from align_cli.experiment import Experiment, producers
from align_cli.method import Method
from align_cli.ranges import Count, NotEmpty
from align_cli.references import Frozen, MismatchKL
from align_cli.sources import FromDataset
from align_cli.statistics import ratio_interval
from align_cli.subject import Subject


def loss(subject: Subject, *, training: Training, limit: Count | None, reference: NotEmpty | None) -> Result:
    """The loss, under the name of its algorithm, and the metrics that training logs beside it, of each held-out group.

    Args:
        limit: at most so many groups.
        reference: a run or model; None: the model that the run started from, or has named.

    Raises:
        UserError: the run samples its responses, or the algorithm needs a reference that nothing names.
    """
    asked = prompts.held_out(subject, training, limit=limit, responses=True)
    experiment = asked.experiment
    assert experiment is not None
    if not isinstance(experiment.source, FromDataset):
        raise UserError(
            f"{subject.name}: the run samples its responses, and its data has none to measure; eval=reward, diversity "
            "and divergence tell what samples are like. data=... with algo=... names data with responses."
        )
    method = method_of(subject, experiment, reference)
    found: dict[int, tuple[dict[str, float], float, float]] = {}  # of each group: metrics, sum of the loss, its size
    name = experiment.algorithm
    for part, filled in measured_parts(subject.measuring, method, asked.groups):
        sums = [float(each.sum()) for each in method.elements(filled)]
        sizes = filled["lengths"].sum(-1).tolist() if experiment.per_token else [1] * len(sums)
        each = zip(part.groups, figures_of_each(method, filled), sums, sizes, strict=True)
        found |= {place: ({name: total / size, **metrics}, total, float(size)) for place, metrics, total, size in each}
    places = range(len(asked.groups))
    return Result(
        _items(subject, asked.groups, [found[place][0] for place in places]),
        figures=_over_tokens(name, [found[place][1:] for place in places]) if experiment.per_token else {},
        made=_made(asked, method, reference),
    )


def method_of(subject: Subject, experiment: Experiment, reference: str | None) -> Method:
    """The loss with the makers of its columns, for the subject as the policy."""
    if subject.is_reward_model or (subject.config is None and reference is None and "reference" not in experiment.made):
        return Method(experiment, producers(experiment), experiment.made)
    if subject.config is None and reference is None:
        raise UserError(f"algo={experiment.algorithm} compares with a reference; eval.reference=MODEL names it.")
    other = prompts.named(subject, reference or experiment.reference.path or START, "eval.reference")
    column = Frozen(other.model, other.manner)
    most = experiment.data.max_length
    mismatch = MismatchKL(subject.measuring, column, budget=experiment.engine.micro_tokens, most=most)
    makers: dict[str, columns.Column] = {"reference": column, "mismatch_kl": mismatch}
    made = experiment.made if "reference" in experiment.made else (*experiment.made, "reference")
    return Method(experiment, producers(experiment) | makers, made)


def _items(subject: Subject, groups: list[Group], values: list[dict[str, float]]) -> list[Item]:
    asked, texts = prompts.written(subject, groups)
    rows = zip(prompts.ids(groups), groups, values, asked, texts, strict=True)
    return [
        Item(name, of, {"prompt": prompt, "responses": responses, "ratings": group.ratings.tolist()})
        for name, group, of, prompt, responses in rows
    ]


def _over_tokens(name: str, pairs: list[tuple[float, float]]) -> dict[str, float]:
    """A loss that is an average over tokens and not over groups."""
    totals, sizes = zip(*pairs, strict=True)
    return flat(name, ratio_interval(totals, sizes))


def _made(asked: HeldOut, method: Method, reference: str | None) -> dict[str, str | int | float | bool | None]:
    told = "none" if "reference" not in method.made else reference or asked.reference
    return {**asked.made, "reference": told}
