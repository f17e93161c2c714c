"""What a run has drawn and kept is learned from again, by the same algorithm, by another, and not where it is unfit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import align, build_model, largest_difference, losses, overrides, read, weights, write_rows

from align_cli import experiment
from align_cli.errors import UserError
from align_cli.rollouts import Kept

STEPS = 4
SAMPLED = (
    "scorer=matches",
    "scorer.pattern='[0-4]'",
    "reference=frozen",
    "source.samples=4",
    "source.max_new_tokens=4",
    "eval.samples=1",
    "train.lr=1e-2",
    f"train.steps={STEPS}",
    "checkpoint.every=2",
)
Given = Callable[..., list[str]]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """The command line of a small run on samples, without `align`."""
    home = tmp_path_factory.mktemp("replay")
    model = build_model(home / "model", seed=0)
    rows = write_rows(home / "rows.jsonl", responses=[2], rows=26)
    return lambda run_dir, *more: ["train", *overrides(model, rows, run_dir, *SAMPLED, *more)]


@pytest.fixture(scope="module")
def kept(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of online DPO that has kept its samples."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    assert align(*given(folder, "algo=dpo", "data.pairs=all", "source=rollout", "source.keep=true")) == 0
    return folder


def files(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / "rollouts").iterdir())}


def test_a_replay_computes_what_the_run_that_drew_the_samples_computed(
    given: Given, kept: Path, tmp_path: Path
) -> None:
    assert list(files(kept)) == [f"step_{step:08d}.jsonl" for step in range(1, STEPS + 1)]
    replay = ("source=replay", f"source.path={kept}")
    assert align(*given(tmp_path / "again", "algo=dpo", "data.pairs=all", *replay)) == 0
    assert losses(tmp_path / "again") == losses(kept)
    assert largest_difference(weights(tmp_path / "again"), weights(kept)) == 0
    assert not (tmp_path / "again" / "rollouts").exists()


def test_samples_of_a_proposal_are_weighted_as_when_they_were_drawn(given: Given, tmp_path: Path) -> None:
    fdpg = ("algo=fdpg", "divergence=js")
    drawn, again = tmp_path / "drawn", tmp_path / "again"
    assert align(*given(drawn, *fdpg, "proposal=adaptive", "proposal.every=2", "source.keep=true")) == 0
    assert align(*given(again, *fdpg, "source=replay", f"source.path={drawn}")) == 0
    assert losses(again) == losses(drawn)
    assert largest_difference(weights(again), weights(drawn)) == 0


def test_other_algorithms_learn_from_the_same_samples(given: Given, kept: Path, tmp_path: Path) -> None:
    """Those that take a sampled policy's ratio to itself for 1 have it from two measurements here."""
    drawn, again, ppo = tmp_path / "drawn", tmp_path / "again", ("algo=ppo", "source.minibatches=2")
    assert align(*given(drawn, *ppo, "source.keep=true")) == 0
    assert align(*given(again, *ppo, "source=replay", f"source.path={drawn}")) == 0
    assert losses(again) == pytest.approx(losses(drawn), abs=1e-4)
    assert align(*given(tmp_path / "fdpg", "algo=fdpg", "source=replay", f"source.path={kept}")) == 0


def test_a_run_that_was_killed_has_kept_each_step_once(given: Given, kept: Path, tmp_path: Path) -> None:
    command = given(tmp_path / "run", "algo=dpo", "data.pairs=all", "source=rollout", "source.keep=true")
    assert align(*command) == 0
    # As if it had been killed in step 4, whose samples were there, and while it wrote them again.
    for path in ("checkpoints/step_00000004", "model"):
        shutil.rmtree(tmp_path / "run" / path)
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "rollouts" / "step_00000004.jsonl").write_text("half of")
    assert align(*command) == 0
    assert files(tmp_path / "run") == files(kept)


def refused(command: list[str], run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command is refused with, before it has written anything."""
    capsys.readouterr()
    assert align(*command) == 2
    assert not run_dir.exists()
    return " ".join(capsys.readouterr().err.split())


MISMATCHES: dict[str, tuple[list[str], str]] = {
    "too few steps": (["train.steps=9"], "it keeps the responses of 4 steps, this run has 9. Use train.steps=4"),
    "other prompts": (["run.seed=1"], "step 1 has responses to other prompts than this run's step"),
    "fewer prompts": (["train.prompts=2"], "step 1 has responses to other prompts than this run's step"),
    "other samples": (["source.samples=2"], "drawn with source.samples=4, this run has 2. Use source.samples=4."),
    "another temperature": (["source.temperature=2"], "drawn with source.temperature=1.0, this run has 2"),
    "another scorer": (["scorer.pattern=a"], "its responses were rated by"),
    "a column that was not kept": (["algo=remax", "kl=fixed"], "it has not kept 'greedy', which this run asks for"),
    "kept again": (["source.keep=true"], "what it learns from is kept in"),
    "drawn as well": (["algo=fdpg", "proposal=adaptive"], "nothing is drawn"),
    "no run": (["source.path=nowhere"], "source.path=nowhere: it keeps no responses. Use a run with source.keep=true"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_replay_that_does_not_fit_is_refused(
    case: str, given: Given, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, words = MISMATCHES[case]
    path = [] if case == "no run" else [f"source.path={kept}"]
    algo = [] if any(each.startswith("algo=") for each in more) else ["algo=dpo", "data.pairs=all"]
    told = refused(given(tmp_path / "run", *algo, "source=replay", *path, *more), tmp_path / "run", capsys)
    assert words in told and "Use " in told


def test_baselines_of_another_number_are_refused(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contrastive = ("algo=ppo", "reward=contrastive", "train.steps=1")
    assert align(*given(tmp_path / "kept", *contrastive, "reward.responses=2", "source.keep=true")) == 0
    replay = (*contrastive, "source=replay", f"source.path={tmp_path / 'kept'}")
    told = refused(given(tmp_path / "run", *replay, "reward.responses=3"), tmp_path / "run", capsys)
    assert "against 2 responses of the starting model, this run asks for 3. Use reward.responses=2." in told


@pytest.mark.parametrize(
    "wrong", [[], ["reference=cached"], ["algo=kto", "data.pairs=null"]], ids=["no scorer", "cached", "kto"]
)
def test_a_refusal_names_the_source_that_was_given(
    wrong: list[str], given: Given, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay = ("algo=dpo", "data.pairs=all", "source=replay", f"source.path={kept}")
    command = [word for word in given(tmp_path / "run", *replay, *wrong) if wrong or not word.startswith("scorer")]
    told = refused(command, tmp_path / "run", capsys)
    assert "source=replay" in told and "source=rollout" not in told


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def changed(file: Path) -> None:
    text = file.read_text()
    file.write_text(text.replace('"ratings": [0.0', '"ratings": [1.0'))
    assert file.read_text() != text


def of_another_step(file: Path) -> None:
    shutil.copy(file.with_name("step_00000002.jsonl"), file)


def of_another_tokenizer(file: Path) -> None:
    head, _, body = file.read_text().partition("\n")
    file.write_text(json.dumps({**json.loads(head), "tokenizer": "0"}) + "\n" + body)


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut, "is damaged, or not what source.keep writes. Use an undamaged copy"),
        (changed, "is damaged"),
        (of_another_step, "is damaged"),
        (lambda file: file.write_bytes(b"\xff\x00"), "is damaged"),
        (lambda file: file.write_text("[]\n"), "is damaged"),
        (of_another_tokenizer, "of another tokenizer than model.path names"),
    ],
    ids=["cut", "changed", "of another step", "no text", "no object", "of another tokenizer"],
)
def test_a_damaged_file_is_refused_before_anything_is_written(
    damage: Callable[[Path], object],
    words: str,
    given: Given,
    kept: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(kept / "rollouts", tmp_path / "copy" / "rollouts")
    damage(tmp_path / "copy" / "rollouts" / "step_00000003.jsonl")
    replay = ("algo=dpo", "data.pairs=all", "source=replay", f"source.path={tmp_path / 'copy'}")
    assert words in refused(given(tmp_path / "run", *replay), tmp_path / "run", capsys)


def test_a_plan_names_the_run_whose_samples_are_replayed(given: Given, kept: Path, tmp_path: Path) -> None:
    checked = read(given(tmp_path / "run", "algo=fdpg", "source=replay", f"source.path={kept}")[1:])
    makers = experiment.column_makers(checked)
    assert makers["behavior"] == makers["ratings"] == f"source=replay: {kept}"


def test_a_step_that_is_damaged_while_a_run_learns_is_not_learned_from(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept / "rollouts", tmp_path / "rollouts")
    there = Kept(tmp_path, {})
    assert len(there.read(2, ())) == 4
    cut(there.file(2))
    with pytest.raises(UserError, match=r"step_00000002\.jsonl is damaged"):
        there.read(2, ())
