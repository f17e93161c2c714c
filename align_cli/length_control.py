"""Win rates without the advantage of length.

Y. Dubois, B. Galambosi, P. Liang, T. Hashimoto, "Length-Controlled AlpacaEval", arXiv 2404.04475, section 3. A logistic
model of a preference of model m over the baseline b on instruction x has three terms,

    P(m ≻ b | x) = σ( θ + φ tanh(Δ / sd(Δ)) + ψ γ(x) ),     Δ = length of m's response − length of b's,

and the length-controlled win rate is the mean over x of σ(θ + ψ γ(x)): what the model expects at equal lengths.
γ(x), how far an instruction favours models over the baseline, is fitted first, to several models at once with ψ = 1.

Departures: one L2 penalty in the place of a penalty chosen by cross-validation and of the pairs that the authors add
against responses which are cut short on purpose; and γ is fitted to the models that are at hand, or left out.
"""

import numpy as np
from numpy.typing import NDArray

from align_cli.statistics import RESAMPLES, Interval

Array = NDArray[np.float64]

STEPS = 100  # of Newton's method, which needs about ten
CLOSE = 1e-10  # a step that changes no coefficient by more is the last
AT_ONCE = 200  # resamples that are fitted together
FEW = 8  # features whose products with each other are kept


def length_feature(lengths: Array, others: Array) -> Array:
    """tanh of the difference in units of its deviation; 0 throughout where all differences are the same.

    Args:
        lengths, others: (N,) characters of the model's and the baseline's responses.
    """
    difference = np.asarray(lengths, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    spread = difference.std()
    return np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)


def logistic(x: Array) -> Array:
    """σ(x), for any size of x."""
    return np.exp(-np.logaddexp(0, -x))


def fit(
    features: Array, preferences: Array, penalty: Array, weights: Array | None = None, start: Array | None = None
) -> Array:
    """The coefficients w that minimise Σ weight × cross-entropy(preference, σ(features · w)) + ½ Σ penalty × w².

    Args:
        features: (N, F).
        preferences: (N,) probabilities that the model is preferred, in [0, 1].
        penalty: (F,), positive, so that there is one minimum even where the model always wins.
        weights: (R, N), how often each observation counts in each of R fits; None: once, in one fit.
        start: (F,), where the search begins; None: 0.

    Returns:
        (R, F).
    """
    often = np.ones((1, len(preferences))) if weights is None else weights
    count = features.shape[1]
    found = np.tile(np.zeros(count) if start is None else start, (len(often), 1))
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1) if count < FEW else None

    def loss(w: Array) -> Array:
        z = w @ features.T
        return (often * (np.logaddexp(0, z) - preferences * z)).sum(-1) + (penalty * w**2).sum(-1) / 2

    now = loss(found)
    for _ in range(STEPS):
        expected = logistic(found @ features.T)
        gradient = (often * (expected - preferences)) @ features + penalty * found
        slope = often * expected * (1 - expected)
        if products is None:
            curvature = np.stack([(features * row[:, None]).T @ features for row in slope])
        else:
            curvature = (slope @ products).reshape(-1, count, count)
        step = np.linalg.solve(curvature + np.diag(penalty), gradient[..., None])[..., 0]
        scale = np.ones((len(found), 1))
        for _ in range(STEPS):  # far from the minimum a whole step may lead beyond it
            there = loss(found - scale * step)
            worse = there > now + 1e-12 * np.abs(now)
            if not worse.any():
                break
            scale[worse] /= 2
        found = found - scale * step
        now = there
        if np.abs(scale * step).max() < CLOSE:
            break
    return found


def difficulties(preferences: Array, lengths: Array, *, ridge: float) -> Array:
    """γ of each instruction, from several models that answered all of them: ψ is 1, θ and φ are each model's own.

    Args:
        preferences: (M, N) of M models over the baseline, on N instructions.
        lengths: (M, N) their `length_feature`.
        ridge: the L2 penalty of each coefficient; of γ it is at least 1, as of a draw from a standard normal.

    Returns:
        (N,), with mean 0.
    """
    models, instructions = preferences.shape
    own = np.repeat(np.eye(models), instructions, axis=0)
    features = np.hstack([own, own * lengths.reshape(-1, 1), np.tile(np.eye(instructions), (models, 1))])
    penalty = np.concatenate([np.full(2 * models, ridge), np.full(instructions, max(1.0, ridge))])
    gamma = fit(features, preferences.reshape(-1), penalty)[0, 2 * models :]
    return gamma - gamma.mean()


def controlled(preferences: Array, lengths: Array, gamma: Array | None, *, ridge: float) -> Interval:
    """The length-controlled win rate in [0, 1], with its percentile bootstrap interval over instructions.

    Args:
        preferences: (N,) in [0, 1], of the model over the baseline.
        lengths: (N,) `length_feature`.
        gamma: (N,) of the instructions; None leaves the term out.
        ridge: the L2 penalty of each coefficient. As it goes to 0 the fitted preferences have the mean of the given
            ones, so that without differences of length this is the raw win rate.

    Raises:
        ValueError: no preferences.
    """
    count = len(preferences)
    if not count:
        raise ValueError("no preferences to fit; expected at least one.")
    own = np.zeros((count, 0)) if gamma is None else gamma[:, None]
    features = np.hstack([np.ones((count, 1)), own, lengths[:, None]])
    equal = np.hstack([np.ones((count, 1)), own, np.zeros((count, 1))])
    penalty = np.full(features.shape[1], ridge)
    best = fit(features, preferences, penalty)[0]
    estimate = logistic(best @ equal.T).mean()
    drawn = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)
    rates = [
        (chunk * logistic(fit(features, preferences, penalty, chunk, best) @ equal.T)).sum(-1) / count
        for chunk in np.split(drawn, range(AT_ONCE, RESAMPLES, AT_ONCE))
    ]
    low, high = np.quantile(np.concatenate(rates), [0.025, 0.975])
    return Interval(float(estimate), float(low), float(high))
