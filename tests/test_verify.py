"""`align verify` finds nothing against our algorithms, and something against broken ones."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import align
from torch import Tensor

from align_cli import advantages, config, experiment, preferences
from align_cli.verify import checks, examine, identities, problems, training, world
from align_cli.verify.checks import Check
from align_cli.verify.examine import Subject
from align_cli.verify.world import World

SUBJECTS = examine.subjects([], [])

# An algorithm, what is replaced in its module, and by what; found without training.
BROKEN = {
    "wrong sign": ("dpo", "return -(pairs", "return (pairs"),
    "mean for sum": ("dpo", ".sum((-2, -1))\n\n\ndef at", ".mean((-2, -1))\n\n\ndef at"),
    "1/beta": ("nca", "score = beta *", "score = 1 / beta *"),
    "wrong axis": ("info_nca", "log_softmax(score, dim=-1)", "log_softmax(score, dim=0)"),
    "forgotten reference": ("ipo", "gap((policy - reference) / lengths)", "gap(policy / lengths)"),
    "dropped detach": ("fdpg", "policy.detach()", "policy"),
    "forgotten importance ratio": ("rloo", "ratio(policy, behavior)", "1 + policy - policy.detach()"),
    "smoothing on the wrong side": (
        "cdpo",
        "(1 - label_smoothing) * agree + label_smoothing * disagree",
        "label_smoothing * agree + (1 - label_smoothing) * disagree",
    ),
    "alpha ignored": ("exo", "log_q = log_softmax(rewards / alpha", "log_q = log_softmax(rewards"),
    "margin ignored": ("simpo", ") - gamma", ")"),
    "weights swapped": ("kto", "undesirable * score.sigmoid()", "desirable * score.sigmoid()"),
    "one divergence for all": ("f_dpo", "divergence.f_prime(policy - reference)", "(policy - reference)"),
    "clip twice as far": ("ppo", "advantages, clip=clip", "advantages, clip=2 * clip"),
    "odds of the wrong response": ("orpo", "logsigmoid(gap(log_odds))", "logsigmoid(-gap(log_odds))"),
}
WITH_DIVERGENCE = {"fdpg": "js", "f_dpo": "js"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world.build(tmp_path_factory.mktemp("world") / "model", seed=0)


def subject_id(subject: Subject) -> str:
    return f"{subject.algorithm} {subject.divergence or ''}".strip()


def without_training(made: World, subject: Subject) -> list[Check]:
    problem = problems.pose(made, subject.algorithm, subject.divergence, [])
    return [*checks.of_loss(problem), *identities.of(subject.algorithm)]


def failing(rows: list[Check]) -> list[str]:
    return [f"{row.check}: {row.measured} {row.trouble}" for row in rows if not row.passed]


@pytest.mark.parametrize("subject", SUBJECTS, ids=subject_id)
def test_nothing_is_found_against_an_algorithm(subject: Subject, made: World) -> None:
    problem = problems.pose(made, subject.algorithm, subject.divergence, [])
    stated = vars(importlib.import_module(f"align_cli.losses.{subject.algorithm}"))
    assert problem.optimum is not None or "optimum" not in stated
    rows = [*checks.of_loss(problem), *identities.of(subject.algorithm)]
    assert not failing(rows)
    assert {"invariances"} < {row.check for row in rows}
    assert all(row.source for row in rows)


@pytest.mark.parametrize("case", BROKEN)
def test_a_mutant_is_found(case: str, made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = BROKEN[case]
    module = importlib.import_module(f"align_cli.losses.{name}")
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1
    broken: dict[str, object] = {"__name__": module.__name__}
    exec(compile(source.replace(old, new), f"<{case}>", "exec"), broken)
    monkeypatch.setattr(module, name, broken[name])
    assert failing(without_training(made, Subject(name, WITH_DIVERGENCE.get(name))))


def test_what_is_no_number_for_some_responses_alone_is_found(made: World) -> None:
    problem = problems.pose(made, "nca", None, [])

    def loss(policy: Tensor, reference: Tensor, rewards: Tensor) -> Tensor:
        return problem.loss(policy, reference, rewards) * (math.nan if policy.shape[-1] == 2 else 1.0)

    (row,) = checks.value(problem.with_loss(loss))
    assert math.isnan(row.measured) and not row.passed


# --- trained


def trained(made: World, name: str, folder: Path, divergence: str | None = None) -> list[Check]:
    problem = problems.pose(made, name, divergence, [])
    return checks.reached(problem, made, training.train(made, problem, folder, []))


@pytest.mark.parametrize("name", ["dpo", "bradley_terry"])
def test_training_reaches_the_optimum(name: str, made: World, tmp_path: Path) -> None:
    rows = trained(made, name, tmp_path / "run")
    assert len(rows) == 2 and not failing(rows)


@pytest.mark.parametrize("case", ["labels the wrong way round", "no penalty", "unmasked tokens"])
def test_a_broken_column_keeps_training_from_the_optimum(
    case: str, made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "labels the wrong way round":
        right = preferences.strict_pairs
        monkeypatch.setitem(training.OFFLINE, "train.steps", 40)
        monkeypatch.setattr(experiment, "strict_pairs", lambda rewards: right(-rewards))
        assert failing(trained(made, "dpo", tmp_path / "run"))
        return
    monkeypatch.setitem(training.ONLINE, "train.steps", 20)
    monkeypatch.setitem(training.ONLINE, "source.samples", 64)
    if case == "no penalty":
        free = advantages.token_rewards
        monkeypatch.setattr(advantages, "token_rewards", lambda *columns, beta: free(*columns, beta=0.0))
    else:
        monkeypatch.setattr(advantages, "_inside", lambda x, mask: x.float().expand(mask.shape))
    assert failing(trained(made, "rloo", tmp_path / "run"))


# --- the command

MINE = """
from torch import Tensor
from align_cli.ranges import Positive


def mine(policy: Tensor, reference: Tensor, rewards: Tensor, *, beta: Positive) -> Tensor:
    score = beta * (policy - reference)
    return (score - rewards).square().VERB(-1)


def at_reference(rewards: Tensor) -> Tensor:
    return rewards.square().sum(-1)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package with the algorithm `mine`, whose text is still to be written."""
    home = tmp_path / "of_mine"
    (home / "losses").mkdir(parents=True)
    (home / "conf" / "algo").mkdir(parents=True)
    for file in ("__init__.py", "losses/__init__.py"):
        (home / file).write_text("")
    (home / "conf" / "algo" / "mine.yaml").write_text("# Mine\nname: mine\nbeta: 0.5  # scale\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield home
    config.use([])
    for name in [name for name in sys.modules if name.startswith("of_mine")]:
        del sys.modules[name]


def here(given: list[Subject], config_dirs: list[str], folder: Path) -> Iterator[tuple[Subject, list[Check]]]:
    for number, subject in enumerate(given):
        yield subject, examine.examine(subject, config_dirs, folder / str(number))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(examine, "examine_all", lambda given, dirs, **_: here(given, dirs, tmp_path / "verify"))
    monkeypatch.setitem(training.OFFLINE, "train.steps", 2)


@pytest.mark.parametrize("verb", ["sum", "mean"])
def test_a_users_own_loss_is_examined(
    verb: str, package: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / "losses" / "mine.py").write_text(MINE.replace("VERB", verb))
    assert align("verify", "mine", "--json", "--plugin", "of_mine") == (0 if verb == "sum" else 1)
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] is (verb == "sum")
    assert [row["check"] for row in told["checks"] if not row["passed"]] == (
        [] if verb == "sum" else ["value at the reference", "training"]
    )


def test_a_loss_that_does_not_run_is_one_failure_after_another(
    package: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / "losses" / "mine.py").write_text(MINE.replace("score - rewards", "score - nothing"))
    assert align("verify", "--plugin", "of_mine", "mine") == 1
    out = capsys.readouterr().out
    assert "NameError: name 'nothing' is not defined" in out
    assert "training" in out


def test_a_misspelt_name_is_refused_before_anything_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert align("verify", "dpoo", "nonsense") == 2
    said = capsys.readouterr().err
    assert "dpoo: there is no such algorithm. Did you mean 'dpo'?" in said
    assert "nonsense" in said


def test_a_worker_of_its_own_examines_and_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert align("verify", "sft") == 0
    out = capsys.readouterr().out
    assert "sft" in out and "checks hold." in out
    assert max(map(len, out.splitlines())) <= 100
