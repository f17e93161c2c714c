"""f-DPG on samples of an older policy: what they are weighted with, when it is renewed, and that a run keeps it."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import align, build_model, largest_difference, overrides, read, summary, weights, write_rows
from torch import Tensor

from align_cli import assembly, distributed, experiment, resources
from align_cli.checkpoints import committed
from align_cli.errors import UserError
from align_cli.proposal import Proposal
from align_cli.tracking import read_metrics
from align_cli.verify.tables import candidates, random_parts

SEQUENCES = 9
EVERY = 3


class OneWeight:
    """An engine whose weights are one number."""

    collective = False
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.weight = torch.zeros(1)

    @contextmanager
    def parts(self) -> Iterator[dict[str, Tensor]]:
        yield {"weight": self.weight}


def proposal(every: int = EVERY) -> tuple[Proposal, OneWeight]:
    engine: Any = OneWeight()
    return Proposal(engine, every), engine


def normal(seed: int) -> Tensor:
    """(SEQUENCES,) log-probabilities."""
    return torch.randn(SEQUENCES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


def exactly(policy: Tensor, target: Tensor) -> float:
    """KL(target ‖ policy)."""
    there = target > -math.inf
    return float((target[there].exp() * (target[there] - policy[there])).sum())


def sampled(policy: Tensor, parts: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Each sequence drawn as often as the proposal has parts of it, and a second prompt of which no Z is known."""
    drawn = candidates(parts)
    behavior = (parts.double() / parts.sum()).log()
    columns = {"policy": policy[drawn], "behavior": behavior[drawn], "target": target[drawn] - 1.7}
    unknown = torch.full_like(columns["target"], -math.inf)
    found = {name: torch.stack([value, value]) for name, value in columns.items()}
    return {**found, "target": torch.stack([columns["target"], unknown]), "log_z": torch.tensor([-1.7, -math.inf])}


@pytest.mark.parametrize("seed", range(6))
def test_the_proposal_is_renewed_when_the_policy_is_nearer_to_the_target(seed: int) -> None:
    parts = random_parts(SEQUENCES, seed)
    behavior, policy, target = (parts.double() / parts.sum()).log(), normal(seed), normal(seed + 100)
    if seed % 2:
        target[[1, 4]] = -math.inf
        target = target.log_softmax(-1)
    own, engine = proposal()
    engine.weight.fill_(5.0)
    nearer = exactly(policy, target) < exactly(behavior, target)
    for step in range(1, 2 * EVERY + 1):
        own.see(sampled(policy, parts, target))
        found = own.settle()
        assert found["proposal/forward_kl"] == pytest.approx(exactly(behavior, target))
        assert found["proposal/policy_forward_kl"] == pytest.approx(exactly(policy, target))
        effective = 1 / float((2 * policy - behavior).exp().sum())  # of each sample
        assert found["proposal/ess"] == pytest.approx(effective * int(parts.sum()))
        assert found["proposal/updates"] == (step // EVERY if nearer else 0)
        assert own.weights["weight"].item() == (5.0 if nearer and step >= EVERY else 0.0)


def test_both_ways_of_deciding_are_looked_at() -> None:
    outcomes = set[bool]()
    for seed in range(6):
        parts = random_parts(SEQUENCES, seed)
        behavior = (parts.double() / parts.sum()).log()
        target = normal(seed + 100)
        outcomes.add(exactly(normal(seed), target) < exactly(behavior, target))
    assert outcomes == {True, False}


def test_a_policy_that_left_all_samples_is_not_nearer() -> None:
    """A target of which the proposal has little, and a policy on what the proposal never draws: nothing shows there."""
    parts = torch.tensor([49, 49, 2])
    target = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64).log()
    own, _ = proposal(every=1)
    for gone in (-20.0, -120.0, -900.0):  # the second is 0 in float32, the third in float64
        own.see(sampled(torch.full((3,), gone, dtype=torch.float64), parts, target))
        found = own.settle()
        assert found["proposal/policy_forward_kl"] > 10 > found["proposal/forward_kl"] and own.updates == 0


def test_a_decision_weighs_every_step_since_the_last() -> None:
    """One step in favour of the policy and two against it are judged by their mean."""
    parts = torch.ones(2, dtype=torch.long)
    target = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    policies = [torch.tensor([p, 1 - p], dtype=torch.float64).log() for p in (0.75, 0.45, 0.45)]
    own, _ = proposal()
    for policy in policies:
        own.see(sampled(policy, parts, target))
        own.settle()
    of_policy = sum(exactly(policy, target) for policy in policies) / 3
    of_proposal = exactly(torch.tensor([0.5, 0.5], dtype=torch.float64).log(), target)
    assert exactly(policies[1], target) > of_proposal > of_policy
    assert own.updates == 1


def test_nothing_is_decided_where_no_z_is_known() -> None:
    own, _ = proposal(every=1)
    columns = sampled(normal(0), random_parts(SEQUENCES, 0), normal(1))
    own.see({**columns, "log_z": torch.full((2,), -math.inf)})
    assert own.settle() == {"proposal/updates": 0.0}


# --- whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", responses=[2], rows=30)


GIVEN = (
    "algo=fdpg",
    "proposal=adaptive",
    "proposal.every=2",
    "scorer=matches",
    "scorer.pattern='^[0-4]'",
    "source.samples=8",
    "source.max_new_tokens=4",
    "eval.samples=2",
    "train.prompts=8",
    "train.lr=1e-2",
    "train.steps=5",
    "checkpoint.every=3",
)


def test_a_run_renews_its_proposal_exactly_when_the_rule_says(model: Path, rows: Path, tmp_path: Path) -> None:
    given = [*GIVEN, "train.steps=12", "source.minibatches=2", "source.epochs=2"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    lines, updates, outcomes = read_metrics(tmp_path / "run"), 0, set[bool]()
    for line in lines:
        if line["step"] % 2 == 0:
            nearer = line["proposal/policy_forward_kl"] < line["proposal/forward_kl"]
            updates += nearer
            outcomes.add(nearer)
        assert line["proposal/updates"] == updates
        assert 0 < line["proposal/ess"] <= 64 + 1e-6
    assert True in outcomes and summary(tmp_path / "run")["proposal/updates"] == updates


def test_a_run_that_is_stopped_keeps_its_proposal(model: Path, rows: Path, tmp_path: Path) -> None:
    whole, cut = (overrides(model, rows, tmp_path / name, *GIVEN) for name in ("whole", "cut"))
    assert align("train", *whole) == 0 and align("train", *cut) == 0
    # As if it had been killed after step 3: the proposal is the policy of step 2, and a decision is half made.
    for path in ("checkpoints/step_00000005", "model"):
        shutil.rmtree(tmp_path / "cut" / path)
    (tmp_path / "cut" / "summary.json").unlink()
    assert [each.step for each in committed(tmp_path / "cut" / "checkpoints")] == [3]
    assert align("train", *cut) == 0
    told = [
        [{name: value for name, value in line.items() if not name.startswith("seconds/")} for line in lines]
        for lines in (read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "cut"))
    ]
    assert told[0][0]["proposal/ess"] == pytest.approx(64, rel=1e-4)  # the first step's samples are the policy's own
    assert told[0] == told[1] and told[0][2]["proposal/updates"] == 1
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0


def test_sampling_leaves_the_policy_as_it_is(model: Path, rows: Path, tmp_path: Path) -> None:
    checked = read(overrides(model, rows, tmp_path / "run", *GIVEN))
    engine = assembly.build_engine(checked, distributed.local_device("cpu"))
    own = assembly.build_proposal(checked, engine)
    assert own is not None
    start = {name: weight.clone() for name, weight in engine.network.state_dict().items()}
    with torch.no_grad():
        for weight in engine.network.parameters():
            weight.mul_(1.5)
    policy = {name: weight.clone() for name, weight in engine.network.state_dict().items()}
    with own.drawing():
        assert largest_difference(dict(engine.network.state_dict()), start) == 0
    assert largest_difference(dict(engine.network.state_dict()), policy) == 0


@pytest.mark.parametrize(
    "given, words",
    [
        (["algo=rloo"], "algo=rloo proposal=adaptive: rloo learns from samples of the policy itself"),
        (["algo=dpo", "source=rollout", "reference=frozen"], "dpo learns from samples of the policy itself"),
        (["algo=nca", "scorer=null"], "proposal=adaptive: nothing reads it with source=dataset"),
        (["algo=fdpg", "divergence=js", "source.temperature=1.5"], "proposal=adaptive source.temperature=1.5: what is"),
        (["algo=fdpg", "divergence=js", "proposal.every=0"], "proposal.every=0"),
        (["algo=fdpg", "divergence=js", "+proposal.steps=3"], "proposal.steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_proposal_without_a_meaning_is_refused(
    given: list[str], words: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    scorer = ["scorer=matches", "scorer.pattern=a"] if "scorer=null" not in given else []
    with pytest.raises(UserError) as refusal:
        read(overrides(model, rows, tmp_path / "run", *scorer, *given, "proposal=adaptive"))
    assert words in str(refusal.value)


def test_a_plan_counts_the_copy_of_what_is_trained() -> None:
    given = ("algo=fdpg", "model=mistral7b", "scorer=matches", "scorer.pattern=a", "launch.accelerator=gpu")
    for adapter in ("none", "lora"):
        plain, drawn = (
            read([*given, f"adapter={adapter}", "engine=zero3", "launch.devices=2", "run.dir=nowhere", *more])
            for more in ([], ["proposal=adaptive"])
        )
        shape = resources.shape_of(plain)
        terms, others = resources.terms(drawn, shape), resources.terms(plain, shape)
        assert terms.pop("proposal") == shape.trained * 2 / 2
        assert terms == others
    assert experiment.column_makers(drawn)["behavior"] == "proposal=adaptive, the sampler"
