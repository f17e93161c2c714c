"""Targets with wanted means of features: the tilt is exact on an enumerated distribution, and runs find it."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import align, build_model, largest_difference, overrides, read, summary, weights, write_rows
from torch import Tensor
from torch.testing import assert_close

from align_cli import targets
from align_cli.data.store import Group
from align_cli.errors import UserError
from align_cli.moments import Fit, fit
from align_cli.tilt import Lambdas, doubt, fitted, told
from align_cli.tracking import read_metrics

OUTCOMES = 11


def distribution(seed: int, prompts: int = 1) -> Tensor:
    """(prompts, outcomes) log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, OUTCOMES, generator=generator, dtype=torch.float64).log_softmax(-1)


def two_features(seed: int, prompts: int = 1) -> Tensor:
    """(prompts, outcomes, 2): one of 0 and 1, and a number that is larger where it is 1."""
    generator = torch.Generator().manual_seed(seed)
    first = (torch.arange(OUTCOMES) % 3 == 0).double().expand(prompts, -1)
    noise = torch.randn(prompts, OUTCOMES, generator=generator, dtype=torch.float64)
    return torch.stack([first, 20 + 5 * noise + 4 * first], dim=-1)


def tilted(log_q: Tensor, features: Tensor, lambdas: Tensor) -> Tensor:
    return (log_q + features @ lambdas).softmax(-1)


def solve(features: Tensor, log_q: Tensor, *moments: float) -> Fit:
    names = [f"f{place}" for place in range(len(moments))]
    return fit(features, log_q, torch.tensor(moments, dtype=torch.float64), names=names)


def occurring(times: int, samples: int, *, prompts: int = 1) -> Tensor:
    """(prompts, samples, 1): a feature of 0 and 1 that each prompt has so often."""
    return (torch.arange(samples) < times).double()[None, :, None].expand(prompts, -1, -1)


@pytest.mark.parametrize("prompts", [1, 4])
def test_under_the_fitted_tilt_the_features_have_their_moments(prompts: int) -> None:
    log_q, features = distribution(1, prompts), two_features(2, prompts)
    wanted = torch.tensor([0.45, 21.0], dtype=torch.float64)
    found = fit(features, log_q, wanted, names=["a", "b"])
    means = torch.einsum("gn,gnf->gf", tilted(log_q, features, found.lambdas), features).mean(0)
    assert_close(means, wanted, rtol=0, atol=1e-10)
    assert_close(found.moments, wanted, rtol=0, atol=1e-10)
    log_z = (log_q + features @ found.lambdas).logsumexp(-1).mean()
    assert found.log_z == pytest.approx(float(log_z), abs=1e-12)


def test_one_feature_of_0_and_1_has_the_closed_form() -> None:
    log_q, features = distribution(3), two_features(2)[..., :1]
    rate = float((log_q.exp() * features[..., 0]).sum())
    for moment in (0.001, 0.3, 0.5, 0.999):
        found = solve(features, log_q, moment)
        odds = math.log(moment * (1 - rate) / (rate * (1 - moment)))
        assert float(found.lambdas) == pytest.approx(odds, abs=1e-10)
        assert found.log_z == pytest.approx(math.log(1 - rate + rate * math.exp(odds)), abs=1e-10)


def test_the_moments_are_the_gradient_of_log_z_and_the_wanted_ones_where_the_dual_is_flat() -> None:
    log_q, features = distribution(1), two_features(2)
    found = solve(features, log_q, 0.6, 22.0)
    at = found.lambdas.clone().requires_grad_()
    (slope,) = torch.autograd.grad((log_q + features @ at).logsumexp(-1).sum(), at)
    assert_close(slope, found.moments, rtol=0, atol=1e-10)


def test_no_other_distribution_with_these_moments_is_nearer() -> None:
    log_q, features = distribution(1), two_features(2)
    found = solve(features, log_q, 0.6, 22.0)
    nearest = tilted(log_q, features, found.lambdas)[0]
    # what changes neither the sum nor a moment
    kept = torch.cat([torch.ones(1, OUTCOMES, dtype=torch.float64), features[0].T])
    free = torch.linalg.svd(kept).Vh[len(kept) :]
    generator = torch.Generator().manual_seed(5)

    def kl(p: Tensor) -> float:
        return float((torch.xlogy(p, p) - p * log_q[0]).sum())

    for scale in (1e-3, 0.3, 1.0):
        for _ in range(50):
            change = torch.randn(len(free), generator=generator, dtype=torch.float64) @ free
            # as far as no probability falls below 0
            reach = (nearest / (-change).clamp(min=1e-300)).min()
            other = nearest + scale * reach * change
            assert_close(other.clamp(min=0) @ features[0], found.moments, rtol=0, atol=1e-9)
            assert kl(other.clamp(min=0)) > kl(nearest)


def test_samples_of_another_distribution_are_weighted() -> None:
    log_q, features, proposal = distribution(1), two_features(2), distribution(4)
    # each outcome as often as the proposal says, up to a constant of the weights
    direct = solve(features, log_q, 0.6, 22.0)
    counts = torch.full((1, OUTCOMES), 7)
    drawn = features.repeat_interleave(7, dim=1)
    uniform = -math.log(OUTCOMES)
    log_weights = (log_q - uniform + 3.0).repeat_interleave(7, dim=1)
    assert int(counts.sum()) == drawn.shape[1] and proposal.shape == log_q.shape
    assert_close(solve(drawn, log_weights, 0.6, 22.0).lambdas, direct.lambdas, rtol=0, atol=1e-9)


def test_features_that_say_the_same_share_the_tilt() -> None:
    log_q, features = distribution(1), two_features(2)
    both = torch.cat([features, 2 * features[..., :1] + 1], dim=-1)
    once, twice = solve(features, log_q, 0.6, 22.0), solve(both, log_q, 0.6, 22.0, 2.2)
    assert_close(tilted(log_q, both, twice.lambdas), tilted(log_q, features, once.lambdas), rtol=0, atol=1e-9)


def test_where_a_rate_depends_on_the_prompt_the_mean_over_prompts_is_met() -> None:
    rates = torch.tensor([[2], [10], [18]])
    features = (torch.arange(20) < rates).double()[..., None]
    logs = torch.zeros(3, 20)
    apart, together = solve(features, logs, 0.8), solve(features.flatten(0, 1)[None], logs.reshape(1, -1), 0.8)
    odds = (rates.double() / (20 - rates)).log()
    assert float((odds + apart.lambdas).sigmoid().mean()) == pytest.approx(0.8, abs=1e-10)
    assert float((odds + together.lambdas).sigmoid().mean()) < 0.75


def test_the_interval_of_the_true_moment_is_honest() -> None:
    """λ is fitted on samples; under the true distribution its moment scatters as the fit says."""
    rate, samples = 0.1, 400
    generator = torch.Generator().manual_seed(0)
    deviations: list[float] = []
    for _ in range(400):
        drawn = (torch.rand(1, samples, 1, generator=generator) < rate).double()
        found = solve(drawn, torch.zeros(1, samples), 0.5)
        true = torch.sigmoid(math.log(rate / (1 - rate)) + found.lambdas)
        deviations.append(float((true - 0.5) / found.errors))
    # the standard deviation of 400 has a standard error of 3.5 %; 4 of them, and some for the curvature
    assert float(torch.tensor(deviations).std()) == pytest.approx(1, abs=0.2)


def test_the_effective_sample_size_counts_the_samples_that_carry_weight() -> None:
    found = solve(occurring(20, 2000), torch.zeros(1, 2000), 0.5)
    # half the weight on 20 samples, half on 1980
    assert found.ess == pytest.approx(1 / (0.25 / 20 + 0.25 / 1980))
    assert solve(occurring(500, 2000), torch.zeros(1, 2000), 0.25).ess == pytest.approx(2000)
    assert solve(occurring(500, 1000, prompts=2), torch.zeros(2, 1000), 0.5).ess == pytest.approx(2000)


REFUSED = {
    "never": (occurring(0, 2048), (0.5,), r"f0: it never occurs in 2048 samples .* its rate is below 0\.15 % at 95 %"),
    "always": (occurring(9, 9), (0.5,), r"f0: it always occurs in 9 samples .* without it is below 33 %"),
    "all": (occurring(3, 9), (1.0,), r"f0\.moment=1: .*infinite λ.*target=pointwise .*below 1"),
    "none": (occurring(3, 9), (0.0,), r"f0\.moment=0: .*infinite λ.*target=pointwise .*above 0"),
    "constant": (3 * occurring(9, 9), (0.5,), r"f0: it is 3 in all 9 samples"),
    "outside": (3 * occurring(4, 9), (3.5,), r"f0\.moment=3\.5: 9 samples .* means between 0 and 3"),
    "no rate": (occurring(4, 9), (1.5,), r"f0\.moment=1\.5: .* means between 0 and 1"),
    "prompts": (
        torch.cat([occurring(0, 9), occurring(4, 9)]),
        (0.6,),
        r"18 samples .* to 2 prompts can be weighted for means between 0 and 0\.5",
    ),
    "hull": (
        torch.tensor([[[0.0, 0], [1, 0], [0, 1]]], dtype=torch.float64),
        (0.7, 0.7),
        r"no finite λ gives 3 samples .* f0 0\.7 \(now 0\.333\), f1 0\.7 \(now 0\.333\) together",
    ),
    "edge": (
        torch.tensor([[[0.0, 0], [1, 0], [0, 1]]], dtype=torch.float64),
        (0.5, 0.5),
        r"no finite λ gives 3 samples .* f0 0\.5 .* f1 0\.5 .* together",
    ),
}


@pytest.mark.parametrize("features, moments, reason", REFUSED.values(), ids=REFUSED.keys())
def test_what_no_finite_tilt_gives_is_refused(features: Tensor, moments: tuple[float, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        solve(features, torch.zeros(features.shape[:2]), *moments)


def groups_of(features: Tensor) -> list[Group]:
    """(G, K, F) as groups that were rated."""
    none = np.zeros(0, dtype=np.int32)
    return [
        Group(place, none, (), np.zeros(0, np.float32), "here", given={"features": each.float().numpy()})
        for place, each in enumerate(features)
    ]


def test_the_fit_travels_as_json_and_gives_the_column_in_the_order_of_the_names() -> None:
    found = fitted(groups_of(two_features(2, 4)), {"a": 0.6, "b": 22.0}, apart=False)
    assert found["samples"] == 4 * OUTCOMES and doubt(found) is None and "a λ=" in told(found)
    column = Lambdas(found, ["b", "a"])(torch.zeros(3, 5, 2))
    assert_close(column, torch.tensor([[found["lambda"]["b"], found["lambda"]["a"]]]).expand(3, 2))
    reference, features = torch.tensor([[-1.0, -2.0]]), torch.tensor([[[1.0, 10.0], [0.0, 20.0]]])
    lambdas = torch.tensor([[0.5, 0.1]])
    assert_close(targets.exponential(reference, features, lambdas), torch.tensor([[0.5, 0.0]]))


def test_a_tilt_that_rests_on_few_samples_is_doubted() -> None:
    found = fitted(groups_of(occurring(1, 400)), {"rare": 0.9}, apart=False)
    assert "leaves 1.2 effective samples of 400" in str(doubt(found))


ONLINE = ("algo=fdpg", "target=exponential", "source.samples=4", "source.max_new_tokens=6", "eval.samples=16")
LOW = "target.features.low={scorer: matches, pattern: '^[0-4]', moment: 0.6}"
LETTER = "target.features.letter={scorer: matches, pattern: '[a-z]', moment: 0.5}"


@pytest.mark.parametrize(
    "given, reason",
    {
        "none": ([], "has at least one feature, as target.features.NAME="),
        "empty": (["target.features={}"], "target.features={}: a target of moments has at least one feature"),
        "number": (["target.features.x=3"], "target.features.x=3: give a name of letters and digits, and keys"),
        "scorer": (["target.features.x={scorer: matchs, moment: 0.5}"], "x.scorer=matchs: .* Did you mean 'matches'"),
        "no scorer": (["target.features.x={moment: 0.5}"], "x.scorer is missing: addition, compiles"),
        "no moment": (["target.features.x={scorer: compiles}"], "target.features.x.moment is missing"),
        "options": (["target.features.x={scorer: compiles, moment: 0.5, words: [a]}"], "x.words: no such key"),
        "text": (["target.features.x={scorer: compiles, moment: half}"], "x.moment=half: input should be a valid num"),
        "samples": ([LOW, "target.samples=0"], "target.samples=0: input should be greater"),
        "normaliser": ([LOW, "target.normaliser=each"], "target.normaliser=each: input should be 'shared' or 'prompt'"),
    }.values(),
)
def test_a_wrong_feature_is_a_sentence(given: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read(["algo=fdpg", "target=exponential", *given])


def test_a_prompt_s_own_z_needs_more_than_the_sample_that_it_normalises() -> None:
    given = ["algo=fdpg", "target=rlhf", "scorer=compiles", "algo.baseline=none", "run.dir=runs/x"]
    with pytest.raises(UserError, match=r"source\.samples=1 target\.normaliser=prompt: .* Use source\.samples=2"):
        read([*given, "source.samples=1"])
    read([*given, "source.samples=2"])
    read([*given, "source.samples=1", "target.normaliser=shared"])


def test_features_rate_the_samples_so_that_no_scorer_is_read() -> None:
    checked = read(["algo=fdpg", "target=exponential", "run.dir=runs/x", LOW, LETTER])
    assert checked.scorer is None and checked.tree["scorer"] is None
    assert checked.moments is not None and checked.moments.wanted == {"low": 0.6, "letter": 0.5}
    assert checked.moments.features["low"].scorer("", "3") == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", responses=[2], rows=30)


def test_a_run_brings_the_features_to_their_moments(model: Path, rows: Path, tmp_path: Path) -> None:
    more = ["train.steps=60", "train.prompts=8", "train.lr=1e-2", "source.samples=16", "eval.samples=64"]
    given = overrides(model, rows, tmp_path / "run", *ONLINE, LOW, LETTER, *more)
    assert align("train", *given) == 0
    found = summary(tmp_path / "run")
    for name, wanted in (("low", 0.6), ("letter", 0.5)):
        before, after = (abs(found[f"eval/{when}/moment/{name}"] - wanted) for when in ("before", "after"))
        # 384 samples have a standard error of 0.025, those that λ was fitted on another 0.04
        assert after < 0.13 and after < before / 2
        assert found[f"target/moment/{name}"] == pytest.approx(wanted, abs=1e-9)
        assert found[f"target/lambda/{name}"] != 0
    assert found["eval/after/alignment"] == found["eval/after/moment/low"]
    assert found["eval/after/moment/low_low"] < found["eval/after/moment/low"] < found["eval/after/moment/low_high"]
    assert {"rollout/moment/low", "rollout/moment/letter"} <= read_metrics(tmp_path / "run")[-1].keys()


def test_a_run_that_goes_on_keeps_its_tilt(model: Path, rows: Path, tmp_path: Path) -> None:
    more = ["train.steps=6", "train.prompts=8", "train.lr=1e-2", "checkpoint.every=3", "target.normaliser=prompt"]
    whole, cut = (overrides(model, rows, tmp_path / name, *ONLINE, LOW, *more) for name in ("whole", "cut"))
    assert align("train", *whole) == 0 and align("train", *cut) == 0
    # as if it had been killed after its third step
    (tmp_path / "cut" / "summary.json").unlink()
    for folder in ("checkpoints/step_00000006", "model"):
        shutil.rmtree(tmp_path / "cut" / folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align_cli.assembly.fitted", None)  # it is not fitted again
        assert align("train", *cut) == 0
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0
    ours, theirs = (summary(tmp_path / name) for name in ("whole", "cut"))
    kept = [key for key in ours if key.startswith("target/")]
    assert kept and [ours[key] for key in kept] == [theirs[key] for key in kept]


def test_a_feature_that_never_occurs_ends_the_run_before_it_learns(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never = "target.features.never={scorer: contains, words: [impossible], moment: 0.5}"
    assert align("train", *overrides(model, rows, tmp_path / "run", *ONLINE, never, "target.samples=60")) == 2
    assert "never occurs in 60 samples of the starting model; its rate is below 5 % at 95 %" in capsys.readouterr().err
