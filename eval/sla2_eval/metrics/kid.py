"""Kernel distance between two sets of videos, in the features of a network that knows their domain."""

from torch import Tensor

from sla2_eval.metrics.frames import UndefinedError


def kid(features: Tensor, reference: Tensor) -> float:
    """Card: `proxy.kid_indomain`.

    Definition: how different the videos of a row, or of a folder, are as a set from the held-out clips that the judge was gated on, in features of the in-domain judge.
    Formula: squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, without the terms of a video with itself:
        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j).
    Range: (-inf, inf) around 0 for equal sets: the estimate has no bias at any number of videos. Direction: lower is closer.
    Source: KID (Binkowski et al. 2018) with an open_clip trained by this study in place of Inception; torchmetrics takes sets of one size
        only, so the formula is ours and tested against it. Emitted only when colour, shape and direction pass the judge's gate.
    Weights: the study's own judge.
    UndefinedError: fewer than two videos on a side.
    Blind spots: sees sets, not videos: a wrong caption or a pair exchanged costs nothing; sees what the judge sees; one number a
        row, without an interval over prompts.

    Args:
        features: (n, D); reference: (m, D).
    """
    if min(len(features), len(reference)) < 2:
        raise UndefinedError(
            f"a distance of sets needs two videos on each side, got {len(features)} and {len(reference)}"
        )
    x, y = features.double(), reference.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())
