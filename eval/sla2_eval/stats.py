"""Means, intervals and verdicts of paired, clustered measurements.

The unit is the prompt; sampling seeds are nested in it; training seeds, where there are several, are crossed with prompts.
A value array has the axes (T, P, S): training seeds, prompts, sampling seeds; NaN marks what could not be measured.

Interval: a two-level bootstrap (prompts with replacement, within each its seeds with replacement) gives the shape. Its quantiles
are bias-corrected and accelerated (BCa, Efron 1987, as in `scipy.stats.bootstrap`), since those of a skewed metric miss on one
side otherwise. Its width is known to be wrong: too small by (P - 1) / P at the first level, too large at the second, where noise
that the first level already carries is drawn again; and two or three training seeds are too few to be resampled. So deviations
from the mean are scaled until their half width is that of the two-way random model, in which each part has Student's tails:

    V_prompts  = s_P^2 / P                                s_P^2: variance of prompt means
    V_training = max(0, s_T^2 / T - s_PT^2 / (P T))       s_T^2: of training-seed means; s_PT^2: of what is left
    error      = sqrt(V_prompts) t(P - 1) + sqrt(V_training) t(T - 1)    t(df): Student's, independent (Behrens and Fisher)

(Satterthwaite's degrees of freedom, the usual shortcut, cover 86 % only where two training seeds differ as much as prompts do.) With
one training seed that is the paired t test on prompt means, and the interval says nothing about another training run; with two,
t(1) makes it wide. Simulated coverage of a 95 % interval is 93 to 97 % from 6 prompts on, where prompts and seeds are normal or
exponential, whatever two or three training seeds differ by, and from 24 prompts on for 0/1 values; with fewer prompts those take too
few values, and it is up to 99.9 %. Near 0 and 1 it is less even: with 32 prompts and 4 seeds 96.4 and 97.3 % for shares of 0.95 and 0.98, 92.6 % for the
difference between shares of 0.99 and 0.95 (1,500 runs each). scipy has neither this bootstrap nor Holm's correction; ours are
tested against its one-level bootstrap and against worked numbers.

A difference of 0/1 values, such as dynamic degree's, takes three values a video, and Student's tails are too thin for that: six of
eight prompts that lose give p = 0.003, while chance does so in 0.031. Its test flips the signs of prompts instead, in all ways or in as
many as there are draws (a paired permutation test; McNemar's with one seed a prompt). It needs one training seed, or the t test stays.

numpy and scipy only; equal seeds give equal numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtr, stdtrit
from scipy.stats import permutation_test

from sla2_eval.bootstrap import bca_levels, bootstrap_means, known_mean


class Part(NamedTuple):
    """A part of the variance of the mean, with the degrees of freedom of its estimate."""

    variance: float
    freedom: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and what is known about it.

    Args:
        mean: mean over prompts of means over seeds; None when nothing was measured.
        low, high: interval; None when it cannot be had, then `reason` says why.
        p_value: two-sided, of mean = 0; meant for differences. Student's t, or a permutation test of a difference of shares.
        n_prompts, n_train_seeds: those with a value; n_seeds: most sampling seeds of a prompt; n_values: cells with a value.
        sd_seeds: standard deviation between sampling seeds of one prompt and training seed, pooled.
        sd_train_seeds: standard deviation between means of training seeds.
        all_zero: every value is exactly 0: of paired differences, all pairs are identical.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    n_prompts: int = 0
    n_seeds: int = 0
    n_train_seeds: int = 0
    n_values: int = 0
    sd_seeds: float | None = None
    sd_train_seeds: float | None = None
    all_zero: bool = False
    reason: str = ""


def estimate(values: np.ndarray, *, draws: int = 10_000, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean with interval.

    Args:
        values: (T, P, S), NaN for what is missing.
        draws: bootstrap draws; 0 leaves the interval out.
        confidence: coverage, in (0, 1).
        seed: of the draws; equal shapes and seeds resample alike, so variants stay paired.
    """
    values = np.asarray(values, float)
    known = np.isfinite(values)
    values = values[known.any((1, 2))][:, known.any((0, 2))]
    if not values.size:
        return Estimate(mean=None, reason="nothing was measured")
    known = np.isfinite(values)
    facts = {
        "mean": float(known_mean(known_mean(known_mean(values, 0), -1), -1)),
        "n_prompts": values.shape[1],
        "n_seeds": int(known.any(0).sum(-1).max()),
        "n_train_seeds": values.shape[0],
        "n_values": int(known.sum()),
        "sd_seeds": _sd_seeds(values),
        "sd_train_seeds": _sd_train_seeds(values),
        "all_zero": not values[known].any(),
    }
    if values.shape[1] < 2:
        return Estimate(**facts, reason="no interval: fewer than two prompts")
    parts = _parts(values)
    if math.sqrt(sum(part.variance for part in parts)) <= 1e-12 * abs(facts["mean"]):
        return Estimate(**facts, reason=f"no interval: no variation among {values.shape[1]} prompts")
    if len(values) == 1 and _all_in(values, (-1, 0, 1)):
        p_value = _sign_flips(known_mean(values[0], -1), draws or 10_000, seed)
    else:
        p_value = min(1.0, 2 * tail_of(parts)(abs(facts["mean"])))
    if not draws:
        return Estimate(**facts, p_value=p_value)
    low, high = _interval(values, facts["mean"], parts, draws, confidence, seed)
    return Estimate(**facts, low=low, high=high, p_value=p_value)


def difference(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Paired differences (T, P, S) of two arrays of the same prompts, sampling seeds and training seeds.

    An array with T = 1 from a row that was never trained is the same for every training seed of the other: give it with its
    axis of length 1. Cells that either side lacks are NaN.
    """
    if values.shape[1:] != reference.shape[1:]:
        raise ValueError(f"arrays {values.shape} and {reference.shape} are not paired by prompt and seed")
    return values - reference


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's step-down correction; None, a comparison that could not be made, is not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[i] = largest
    return corrected


def verdict(found: Estimate, p_holm: float | None, margin: float | None, confidence: float = 0.95) -> str:
    """`identical`, `equivalent`, `resolved` or `not resolved at n=<prompts>`, of a paired difference; empty where nothing was paired by prompt.

    identical: every pair is, to the last bit. What does not vary has no interval, so nothing is claimed of other prompts.
    equivalent: the whole interval lies within the margin, also when it leaves out 0: a difference too small to matter.
    resolved: the interval leaves out 0 and so does the test corrected over the metrics.
    """
    if found.mean is None or not found.n_prompts:
        return ""
    if found.all_zero:
        return "identical"
    if found.low is None or found.high is None:
        return f"not resolved at n={found.n_prompts}"
    if margin is not None and -margin < found.low and found.high < margin:
        return "equivalent"
    if (found.low > 0 or found.high < 0) and p_holm is not None and p_holm < 1 - confidence:
        return "resolved"
    return f"not resolved at n={found.n_prompts}"


def _interval(
    values: np.ndarray, mean: float, parts: list[Part], draws: int, confidence: float, seed: int
) -> tuple[float, float]:
    means = bootstrap_means(values, draws, seed)
    means = means[np.isfinite(means)]
    tail = (1 - confidence) / 2
    scale = half_width(parts, tail) / (means.std() * ndtri(1 - tail))  # the bootstrap's own half width, were it normal
    low, high = mean + scale * (np.quantile(means, bca_levels(values, mean, means, tail)) - mean)
    for possible in ((0, 1), (-1, 0, 1)):  # a share, a difference of shares
        if _all_in(values, possible):
            return float(max(low, possible[0])), float(min(high, 1))
    return float(low), float(high)


def _all_in(values: np.ndarray, possible: tuple[int, ...]) -> bool:
    """Whether every known value is one of these."""
    return bool(np.isin(values[np.isfinite(values)], possible).all())


def _sign_flips(prompts: np.ndarray, draws: int, seed: int) -> float:
    """p value of means of prompts (P,) being 0, when each could as well have had the other sign."""
    if (prompts >= 0).all() or (prompts <= 0).all():  # as extreme are only all signs as they are and all flipped
        return min(1.0, 2.0 ** (1 - np.count_nonzero(prompts)))
    found = permutation_test(
        (prompts,),
        lambda means, axis: means.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=draws,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _parts(values: np.ndarray) -> list[Part]:
    """What makes the mean of (T, P, S) vary: prompts, and where there are several, training seeds."""
    cells = known_mean(values, -1)  # (T, P)
    prompts = cells.shape[1]
    parts = [Part(float(known_mean(cells, 0).var(ddof=1) / prompts), prompts - 1)]
    complete = cells[:, np.isfinite(cells).all(0)]
    trainings, paired = complete.shape
    if trainings > 1 and paired > 1:
        rest = complete - complete.mean(0) - complete.mean(1, keepdims=True) + complete.mean()
        rest = (rest**2).sum() / ((trainings - 1) * (paired - 1))
        variance = complete.mean(1).var(ddof=1) / trainings - rest / (trainings * paired)
        parts.append(Part(max(0.0, float(variance)), trainings - 1))
    return parts


def tail_of(parts: list[Part]) -> Callable[[float], float]:
    """The chance that the parts, each with Student's tails, add up to more than a distance (Behrens and Fisher)."""
    # The smaller one is integrated over: what is left of the larger one is smooth then.
    first, *others = sorted((part for part in parts if part.variance), key=lambda part: part.variance)
    if not others:
        return lambda distance: float(stdtr(first.freedom, -distance / math.sqrt(first.variance)))
    (second,) = others
    z, step = np.linspace(-8, 8, 321, retstep=True)  # normal quantiles at which the smaller part is taken
    weights, moved = step * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), stdtrit(first.freedom, ndtr(z))
    moved *= math.sqrt(first.variance)
    return lambda distance: float(weights @ stdtr(second.freedom, -(distance - moved) / math.sqrt(second.variance)))


def half_width(parts: list[Part], tail: float) -> float:
    """Of an interval that leaves out `tail` on each side."""
    alone = [float(stdtrit(part.freedom, 1 - tail)) * math.sqrt(part.variance) for part in parts if part.variance]
    if len(alone) == 1:
        return alone[0]
    beyond = tail_of(parts)
    return brentq(lambda distance: beyond(distance) - tail, 0, 2 * sum(alone), xtol=1e-6 * max(alone))


def _sd_seeds(values: np.ndarray) -> float | None:
    count = np.isfinite(values).sum(-1)
    freedom = np.clip(count - 1, 0, None).sum()
    if not freedom:
        return None
    return float(math.sqrt(np.nansum((values - known_mean(values, -1)[..., None]) ** 2) / freedom))


def _sd_train_seeds(values: np.ndarray) -> float | None:
    complete = values[:, np.isfinite(values).all((0, 2))]
    if len(values) < 2 or not complete.size:
        return None
    return float(complete.mean((1, 2)).std(ddof=1))
