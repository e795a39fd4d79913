"""Temporal flickering: how much pixels change from one frame to the next."""

import itertools

import numpy as np

from sla2_eval.metrics.frames import UndefinedError, as_array, as_float


def temporal_flickering(video) -> float:
    """Card: `temporal_flickering`, exact.

    Definition: one minus the mean absolute change between neighbouring frames, as a share of the grey range.
    Formula: 1 - mean_t(mean|I_t - I_{t+1}|) / 255.
    Range: [0, 1]. Direction: higher is steadier.
    Source: VBench `temporal_flickering` (commit 45e79ec), the same formula on our lossless frames; no weights.
    UndefinedError: fewer than two frames (VBench gives NaN).
    Blind spots: motion lowers it by construction, so VBench keeps near-static clips only; compare equal prompts. A frozen or
        blank video scores 1: read the guards beside it. Blur raises it slightly.

    Card: `temporal_flickering_static`, exact.

    Definition: temporal flickering of the videos whose prompts promise a static scene: nothing moves or turns, and the camera rests.
    Formula: as for temporal flickering.
    Range: [0, 1]. Direction: higher is steadier.
    Source: VBench measures static clips only, which it finds by optical flow; here the known scene parameters say which they are
        (static_filter: scene_params), so that a variant cannot choose its own subset by what it makes move. No weights.
    UndefinedError: fewer than two frames; no row for a prompt that promises motion.
    Blind spots: a video that moves against its prompt is not left out, as VBench's filter would, and scores lower for it; a frozen
        video scores 1; a study without a prompt of rest has no value.

    Args:
        video: (T, H, W, 3), uint8 or floats in [0, 1].

    Raises:
        UndefinedError: as above.
    """
    frames = as_array(video)
    if len(frames) < 2:
        raise UndefinedError("temporal flickering needs two frames")
    # Pair by pair: floats of a whole clip are a hundred times a processor's cache.
    changes = [
        np.abs(as_float(b) - as_float(a)).mean(dtype=np.float64)
        for a, b in itertools.pairwise(frames[t : t + 1] for t in range(len(frames)))
    ]
    return float(1.0 - np.mean(changes) / 255.0)
