"""Two-level bootstrap of clustered values: prompts with replacement, within each its sampling seeds with replacement.

A value array has the axes (T, P, S): training seeds, prompts, sampling seeds; NaN marks what could not be measured.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, ndtri

CHUNK = 8_000_000  # values resampled at once: 64 MB


def bootstrap_means(values: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Means (draws,) of two-level resamples of (T, P, S)."""
    cells = known_mean(values, 0)  # (P, S)
    if draws * cells.size <= CHUNK and np.isfinite(cells).all():
        return _weights(*cells.shape, draws, seed) @ cells.reshape(-1)
    chosen = _resamples(*cells.shape, draws, seed)
    return np.concatenate([known_mean(known_mean(cells.reshape(-1)[places], -1), -1) for places in chosen])


def _resamples(prompts: int, seeds: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Which of the P S cells each draw takes, (draws, P, S), in chunks."""
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK // (prompts * seeds))
    for start in range(0, draws, chunk):
        count = min(chunk, draws - start)
        chosen = rng.integers(prompts, size=(count, prompts, 1)) * seeds
        yield chosen + rng.integers(seeds, size=(count, prompts, seeds))


@lru_cache(maxsize=4)
def _weights(prompts: int, seeds: int, draws: int, seed: int) -> np.ndarray:
    """Weight of every cell in the mean of every draw, (draws, P S): all metrics of a study that miss nothing share these."""
    cells = prompts * seeds
    (chosen,) = _resamples(prompts, seeds, draws, seed)
    places = chosen.reshape(draws, cells) + cells * np.arange(draws)[:, None]
    return np.bincount(places.reshape(-1), minlength=draws * cells).reshape(draws, cells) / cells


def bca_levels(values: np.ndarray, mean: float, means: np.ndarray, tail: float) -> np.ndarray:
    """Levels (2,) at which to read the bootstrap's `means` for an interval that leaves out `tail` on each side (Efron 1987).

    Bias correction z0: how far the bootstrap's median is from the mean; acceleration a: a sixth of the skewness of the mean, by the
    jackknife over prompts.
    """
    away = known_mean(known_mean(values, 0), -1) - mean  # of prompts
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    rounding = 1e-9 * means.std()
    bias = ndtri(((means < mean - rounding).mean() + (means <= mean + rounding).mean()) / 2)
    z = bias + ndtri([tail, 1 - tail])
    return ndtr(bias + z / (1 - acceleration * z))


def known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is known; NaN where nothing is."""
    if not np.isnan(values).any():
        return values.mean(axis)
    count = np.isfinite(values).sum(axis)
    total = np.nansum(values, axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
