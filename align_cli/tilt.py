"""The column `lambdas`: the tilt that gives the features of a target their moments (`align_cli.moments`).

It is fitted once, on samples of the model that the run starts from, before its first step, and is saved with the run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align_cli.data.store import Group
from align_cli.moments import fit
from align_cli.statistics import NORMAL_97_5

SCARCE = 0.01  # share of the samples below which the effective ones are too few to trust λ


class Lambdas:
    """The fitted λ.

    Args:
        fitted: of this or an earlier session, see `fitted`.
        names: of the features, in their order in the columns.
    """

    def __init__(self, fitted: Mapping[str, Any], names: Sequence[str]) -> None:
        self.fitted = dict(fitted)
        self.values = torch.tensor([fitted["lambda"][name] for name in names], dtype=torch.float64)

    def __call__(self, features: Tensor) -> Tensor:
        """(B, F) λ, alike for all prompts."""
        return self.values.to(features.device, features.dtype).expand(len(features), -1)

    def state(self) -> dict[str, Any]:
        """What was fitted, as JSON can hold it."""
        return self.fitted


def fitted(groups: Sequence[Group], wanted: Mapping[str, float], *, apart: bool) -> dict[str, Any]:
    """The tilt under which samples of the starting model have the wanted moments.

    Args:
        groups: with their features, in the order of `wanted`; drawn from the starting model at temperature 1.
        wanted: the moment of each feature.
        apart: each prompt is normalised by itself, else all samples together, as if of one prompt.

    Returns:
        `lambda`, `before` (its mean in the samples), `moment` and `error` of each feature, and `samples`, `ess`,
        `log_z`, `iterations` (`align_cli.moments.Fit`).

    Raises:
        UserError: there is no such tilt.
    """
    features = np.stack([group.given["features"] for group in groups])
    values, names = torch.from_numpy(features).double(), list(wanted)
    values = values if apart else values.flatten(0, 1)[None]
    moments = torch.tensor(list(wanted.values()), dtype=torch.float64)
    found = fit(values, torch.zeros(values.shape[:2], dtype=torch.float64), moments, names=names)
    columns = {"lambda": found.lambdas, "before": values.mean((0, 1)), "moment": found.moments, "error": found.errors}
    per_feature = {key: dict(zip(names, column.tolist(), strict=True)) for key, column in columns.items()}
    counts = {"samples": values[..., 0].numel(), "ess": found.ess, "log_z": found.log_z, "iterations": found.iterations}
    return {**per_feature, **counts}


def told(fitted: Mapping[str, Any]) -> str:
    """The fit in a line."""
    each = ", ".join(
        f"{name} λ={value:.4g} for {fitted['before'][name]:.4g} → {fitted['moment'][name]:.4g} "
        f"± {NORMAL_97_5 * fitted['error'][name]:.2g}"
        for name, value in fitted["lambda"].items()
    )
    return (
        f"target: fitted on {fitted['samples']:,} responses of the starting model in {fitted['iterations']} Newton "
        f"steps: {each}; effective sample size {fitted['ess']:.0f}"
    )


def doubt(fitted: Mapping[str, Any]) -> str | None:
    """What is to be said against the fit, if anything."""
    if fitted["ess"] >= SCARCE * fitted["samples"]:
        return None
    return (
        f"target: the tilt leaves {fitted['ess']:.1f} effective samples of {fitted['samples']:,}, so λ rests on few; "
        "use more target.samples, or moments nearer to the starting model's."
    )


def summary(fitted: Mapping[str, Any]) -> dict[str, float]:
    """The fit under flat keys: `target/lambda/<feature>`, `target/moment/<feature>` with the bounds `_low` and `_high`
    of its 95 % interval under the true target, `target/ess`, `target/log_z`."""
    found: dict[str, float] = {}
    for name, value in fitted["lambda"].items():
        moment, half = fitted["moment"][name], NORMAL_97_5 * fitted["error"][name]
        found[f"target/lambda/{name}"] = value
        found[f"target/moment/{name}"] = moment
        found |= {f"target/moment/{name}_low": moment - half, f"target/moment/{name}_high": moment + half}
    return found | {"target/ess": fitted["ess"], "target/log_z": fitted["log_z"]}
