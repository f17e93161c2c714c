"""What contrastive rewards do to variance and to the noise of a rater, drawn as a run would draw it.

Shen et al., arXiv 2403.07708, claim that contrastive rewards reduce variance and penalise an uncertain rater. With s_w²
the variance of ratings within prompts, s_b² that between prompts and k baselines a prompt, as this project derives it:

    Var(r − b) = s_w² (1 + 1/k)  against  Var(r) = s_w² + s_b²,  less where k > s_w²/s_b²
    E[r − b]   = (1 − c₀ − c₁) (r* − E r*)  where bad responses pass with c₀ and good ones fail with c₁
"""

import torch
from torch import Tensor

from align_cli.ranges import Count, OpenFraction, Positive
from align_cli.rewards import contrastive

FIGURES = ("raw/variance", "contrastive/*/variance", "contrastive/*/of_law", "contrastive/*/of_raw", "signal/of_law")


def contrast_variance(
    seed: int,
    *,
    prompts: Count,
    responses: list[Count],
    within: Positive,
    between: Positive,
    passes: OpenFraction,
    fails: OpenFraction,
) -> dict[str, float]:
    """Draw ratings of the starting model's responses, and contrast them.

    Args:
        prompts: independent draws; each figure's relative deviation is about sqrt(2 / prompts).
        responses: each k, baselines of a prompt.
        within, between: standard deviation of ratings within and between prompts.
        passes, fails: c₀ and c₁ of the rater whose signal is measured.

    Returns:
        The variance of raw ratings; for each k that of contrastive rewards, and how many times the law's and the raw
        variance it is; and the slope of contrastive rewards over what is true, as a multiple of 1 − c₀ − c₁.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    centre = between * normal(prompts, 1)
    rated = centre + within * normal(prompts, 1)
    raw = float(rated.var())
    figures = {"raw/variance": raw}
    for k in responses:
        variance = float(contrastive(rated, centre + within * normal(prompts, k), aggregate="mean").var())
        figures[f"contrastive/{k}/variance"] = variance
        figures[f"contrastive/{k}/of_law"] = variance / (within**2 * (1 + 1 / k))
        figures[f"contrastive/{k}/of_raw"] = variance / raw

    def drawn(k: int) -> tuple[Tensor, Tensor]:
        """Whether each of k responses is good, and what the rater says of it; half are good."""
        good = (torch.rand((prompts, k), dtype=torch.float64, generator=generator) < 0.5).double()
        chance = good * (1 - fails) + (1 - good) * passes
        return good, (torch.rand((prompts, k), dtype=torch.float64, generator=generator) < chance).double()

    good, said = drawn(1)
    contrasts = contrastive(said, drawn(max(responses))[1], aggregate="mean")
    centred = good - good.mean()
    slope = float((centred * contrasts).sum() / (centred**2).sum())
    return figures | {"signal/of_law": slope / (1 - passes - fails)}
