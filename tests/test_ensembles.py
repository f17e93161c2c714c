"""Several reward models that rate together: what they say, by how much they disagree, and who may read that."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import align, largest_difference, overrides, read, summary, weights
from transformers import AutoTokenizer

from align_cli import columns, config, experiment, memory, resources
from align_cli.data.store import Group
from align_cli.models.causal import Manner
from align_cli.raters import ByModel, Ensemble, Rater, Unrated
from align_cli.tracking import read_metrics

ONLINE = ("algo=rloo", "source=rollout", "source.samples=3", "source.max_new_tokens=6", "train.prompts=6")
# With ε = lr an update moves a weight by about as much as its gradient differs.
STEADY = ("train.steps=3", "optimizer.eps=1e-3", "eval.samples=2")


@pytest.fixture(scope="module")
def raters(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two reward models whose heads differ."""
    folder = tmp_path_factory.mktemp("raters")
    given = ("algo=bradley_terry", "data.pairs=all", "train.steps=2", "eval.groups=1")
    assert align("train", *overrides(tiny_model, pairs_file, folder / "run", *given)) == 0
    found = [folder / "one", folder / "other"]
    for seed, path in enumerate(found):
        shutil.copytree(folder / "run" / "model", path)
        told = load_file(path / "model.safetensors")
        told["score.weight"] = torch.randn(told["score.weight"].shape, generator=torch.Generator().manual_seed(seed))
        save_file(told, path / "model.safetensors", metadata={"format": "pt"})
    return found


def ensemble(*paths: Path) -> list[str]:
    return ["scorer=ensemble", f"scorer.paths=[{','.join(map(str, paths))}]"]


def group(*ratings: float) -> Group:
    told = np.array(ratings, dtype=np.float32)
    return Group(0, np.zeros(1, dtype=np.int32), (np.zeros(1, dtype=np.int32),) * len(ratings), told, "here")


def saying(*ratings: float) -> Rater:
    return lambda groups: [group(*ratings) for _ in groups]


@pytest.mark.parametrize(
    "aggregate, caution, ratings",
    [("mean", 0.0, [2, 5]), ("min", 0.0, [1, 5]), ("mean", 0.5, [1.5, 5]), ("min", 2.0, [-1, 5])],
)
def test_ratings_and_spread_worked_out_by_hand(aggregate: Any, caution: float, ratings: list[float]) -> None:
    members = [saying(1, 5), saying(3, 5)]  # a deviation of 1, and of 0
    (found,) = Ensemble(members, aggregate, caution)([group(0, 0)])
    assert isinstance(found, Group)
    assert found.ratings.tolist() == ratings and found.given["spread"].tolist() == [1, 0]


def test_one_member_says_what_it_says_alone_and_agrees_with_itself() -> None:
    (found,) = Ensemble([saying(0.1, -7)], "mean", 3.0)([group(0, 0)])
    assert isinstance(found, Group)
    assert found.ratings.tolist() == group(0.1, -7).ratings.tolist() and found.given["spread"].tolist() == [0, 0]


def test_what_a_member_cannot_rate_the_ensemble_cannot() -> None:
    (found,) = Ensemble([saying(1), lambda groups: [Unrated("no number")]], "mean", 0.0)([group(0)])
    assert found == Unrated("no number")


def test_the_spread_is_a_column_that_rewards_may_ask_for(
    raters: list[Path], tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caution that a reward takes is the ensemble's own."""
    home = tmp_path / "wary"
    (home / "conf" / "reward").mkdir(parents=True)
    (home / "conf" / "reward" / "wary.yaml").write_text("name: wary\ncaution: 0.5\n")
    (home / "__init__.py").touch()
    (home / "rewards.py").write_text(
        "def wary(ratings, spread, *, caution: float):\n    return ratings - caution * spread\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = overrides(tiny_model, pairs_file, tmp_path / "own", *ONLINE, *STEADY, *ensemble(*raters))
    assert align("train", *own, "scorer.caution=0.5") == 0
    other = overrides(tiny_model, pairs_file, tmp_path / "other", *ONLINE, *STEADY, *ensemble(*raters))
    assert align("train", "--plugin", "wary", *other, "reward=wary") == 0
    config.use([])
    assert largest_difference(weights(tmp_path / "own"), weights(tmp_path / "other")) < 1e-6
    assert all(line["rewards/spread"] > 0.01 for line in read_metrics(tmp_path / "own"))
    assert summary(tmp_path / "own")["eval/after/rewards/spread"] > 0.01


def test_an_ensemble_of_one_trains_as_its_member(
    raters: list[Path], tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    one = overrides(tiny_model, pairs_file, tmp_path / "one", *ONLINE, *STEADY, *ensemble(raters[0]))
    alone = overrides(tiny_model, pairs_file, tmp_path / "alone", *ONLINE, *STEADY)
    assert align("train", *one) == 0
    assert align("train", *alone, "scorer=model", f"scorer.path={raters[0]}") == 0
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "alone")) == 0
    assert all(line["rewards/spread"] == 0 for line in read_metrics(tmp_path / "one"))
    assert "rewards/spread" not in read_metrics(tmp_path / "alone")[0]


def test_a_member_that_visits_goes_back_to_the_host_and_rates_the_same() -> None:
    class Watched(torch.nn.Module):
        """Says where it was sent."""

        def __init__(self) -> None:
            super().__init__()
            self.went: list[str] = []

        def to(self, *places: Any) -> "Watched":  # pyright: ignore[reportIncompatibleMethodOverride]
            self.went.append(str(places[0]))
            return self

    network = Watched()
    rater = ByModel(network, Manner(True, scalar="scores"), torch.device("cpu", 0), 9, visits=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ByModel, "_rated", lambda self, groups: [*network.went])
        assert rater([]) == ["cpu:0"]
    assert network.went == ["cpu:0", "cpu"]


def test_a_member_of_another_tokenizer_is_named(
    raters: list[Path], tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = tmp_path / "stranger"
    shutil.copytree(raters[1], stranger)
    tokenizer = AutoTokenizer.from_pretrained(stranger)
    tokenizer.add_tokens(["xyz"])
    tokenizer.save_pretrained(stranger)
    given = overrides(tiny_model, pairs_file, tmp_path / "run", *ONLINE, *ensemble(raters[0], stranger))
    assert align("train", *given) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"scorer.paths={stranger}: its tokenizer has other tokens than" in told


@pytest.mark.parametrize(
    "given, told",
    [
        (["scorer=ensemble", "scorer.paths=[]"], "scorer.paths"),
        (["scorer=ensemble", "scorer.paths=one"], "scorer.paths"),
        (["scorer=ensemble", "scorer.paths=[a]", "scorer.aggregate=max"], "scorer.aggregate"),
        (
            ["scorer=ensemble", "scorer.paths=[a]", "algo=fdpg", "target=pointwise", "divergence=js"],
            "target=rlhf takes",
        ),
    ],
)
def test_an_ensemble_of_nothing_or_of_no_ratings_is_refused(
    given: list[str], told: str, tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert align("train", *overrides(tiny_model, pairs_file, tmp_path / "run", *ONLINE, *given)) == 2
    assert told in capsys.readouterr().err


def test_the_plan_counts_the_reward_models_that_lie_beside_the_policy(capsys: pytest.CaptureFixture[str]) -> None:
    large = ["algo=rloo", "source=rollout", "model=qwen2_5_0_5b", "data=ultrafeedback", "adapter=none"]
    large += ["run.dir=nowhere", "launch.accelerator=gpu", "scorer=ensemble", "scorer.paths=[a,b,c]"]
    shape = memory.shape(read(large).model, read(large).adapter)
    found = [resources.terms(read([*large, *more]), shape) for more in ([], ["scorer.apart=true"])]
    assert found[0]["reward models"] == 3 * found[1]["reward model"] == 3 * 2 * shape.parameters
    # ZeRO-3 shares them out
    spread = read([*large, "scorer.apart=true", "engine=zero3", "launch.devices=2"])
    assert resources.terms(spread, shape)["reward models"] == 3 * 2 * shape.parameters / 2
    assert align("plan", *large, "launch.memory_gb=4") == 1
    told = capsys.readouterr().out
    assert "scorer.apart=true: " in told and "3 reward models" in told


def test_only_an_ensemble_has_a_spread() -> None:
    assert "spread" in columns.GLOSSARY
    table = experiment.column_makers(read(["algo=rloo", "model=tiny", "run.dir=nowhere"]))
    assert "spread" not in table
