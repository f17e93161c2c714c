"""The studies of recipes: what they measure agrees with what is known of it otherwise."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from small_runs import align

from align_cli import exits
from align_cli.studies.contrast_variance import contrast_variance
from align_cli.studies.dpg_variance import dpg_variance
from align_cli.studies.mode_seeking import BUMPS, POINTS, WIDTH, mode_seeking


def normal(mean: float, deviation: float) -> np.ndarray:
    weights = np.exp(-0.5 * ((POINTS.numpy() - mean) / deviation) ** 2)
    return weights / weights.sum()


def test_the_best_gaussians_are_those_that_another_optimizer_finds() -> None:
    target = sum(weight * normal(mean, WIDTH) for weight, mean in BUMPS)

    def reverse(free: np.ndarray) -> float:
        policy = normal(free[0], math.exp(free[1])) + 1e-300
        return float((policy * np.log(policy / target)).sum())

    def forward(free: np.ndarray) -> float:
        return -float((target * np.log(normal(free[0], math.exp(free[1])) + 1e-300)).sum())

    found = mode_seeking(0, responses=[2], draws=50)
    for name, objective in (("exo", reverse), ("dpo", forward)):
        fits = [
            optimize.minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12})
            for start in ((-2.5, 0.0), (0.0, 0.7), (2.5, 0.0))
        ]
        mean, log_deviation = min(fits, key=lambda fit: fit.fun).x
        assert found[f"{name}/all/mean"] == pytest.approx(mean, abs=1e-4)
        assert found[f"{name}/all/deviation"] == pytest.approx(math.exp(log_deviation), abs=1e-4)


def test_both_losses_are_fitted_on_the_same_draws_and_follow_the_seed() -> None:
    once = mode_seeking(1, responses=[3], draws=60)
    assert once == mode_seeking(1, responses=[3], draws=60)
    other = mode_seeking(2, responses=[3], draws=60)
    assert once["dpo/3/mean"] != other["dpo/3/mean"]
    assert once["exo/all/mean"] == other["exo/all/mean"]


def test_the_variance_of_contrastive_rewards_follows_the_law() -> None:
    prompts, within, between = 100_000, 0.5, 0.8
    found = contrast_variance(
        0, prompts=prompts, responses=[1, 4], within=within, between=between, passes=0.3, fails=0.2
    )
    five = 5 * math.sqrt(2 / prompts)  # deviations of a variance of normal draws, relative to it
    assert found["raw/variance"] == pytest.approx(within**2 + between**2, rel=five)
    for k in (1, 4):
        assert found[f"contrastive/{k}/variance"] == pytest.approx(within**2 * (1 + 1 / k), rel=five)
        assert found[f"contrastive/{k}/of_law"] == pytest.approx(1, rel=five)
    # the slope on a coin of variance 1/4 of what is said, whose deviation with its baselines is below 0.6
    assert found["signal/of_law"] == pytest.approx(1, abs=5 * 0.6 / 0.5 / math.sqrt(prompts) / 0.5)


def test_gradients_of_samples_are_unbiased_and_an_estimate_of_z_from_them_is_not() -> None:
    found = dpg_variance(0, responses=32, satisfied=0.1, floor=0.01, learned=1.0, samples=4, batches=20_000)
    for name in ("forward_kl", "js", "tv", "reverse_kl"):
        # the mean square of 32 standard normal errors has the deviation sqrt(2 / 32)
        assert found[f"{name}/error"] ** 2 == pytest.approx(1, abs=5 * math.sqrt(2 / 32))
        parts = found[f"{name}/leave_one_out/variance"] / found[f"{name}/none/variance"]
        assert found[f"{name}/leave_one_out/of_none"] == pytest.approx(parts)
    assert found["z/batch/error"] > 3 * found["z/exact/error"]


OF_A_SECOND = ("contrast_variance", "prompts=50", "responses=[1]", "within=1", "between=1", "passes=0.3", "fails=0.2")


def test_a_file_holds_one_seed_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.json"
    assert align("study", *OF_A_SECOND, f"out={file}") == exits.DONE
    first, kept = capsys.readouterr().out, file.read_bytes()
    assert align("study", *OF_A_SECOND, f"out={file}") == exits.DONE
    assert capsys.readouterr().out == first
    assert align("study", *OF_A_SECOND, "seed=7", f"out={file}") == exits.USER
    assert "holds seed 0 of contrast_variance" in capsys.readouterr().err
    assert file.read_bytes() == kept


@pytest.mark.parametrize("flag", [["-m"], ["--cfg"], ["--config-dir", "."]], ids=" ".join)
def test_a_study_refuses_flags_that_it_has_no_use_for(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert align("study", *OF_A_SECOND, *flag) == exits.USER
    assert "a study has options alone" in capsys.readouterr().err
