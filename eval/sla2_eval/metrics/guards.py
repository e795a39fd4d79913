"""Guards: marks of a degenerate video, on which consistency metrics would look perfect."""

import numpy as np

from sla2_eval.metrics.frames import as_array, as_float


def guards(video, expected: tuple[int, int, int] | None = None) -> dict[str, float]:
    """Card: `guard.static`, `guard.blank`, `guard.saturated`, `guard.not_finite`, `guard.size`.

    Definition: marks of a degenerate video.
    Formula: each is 1 when raised and else 0:
        static: no pixel changes by 1/255 between any two neighbouring frames (a single frame is static).
        blank: in every frame and channel the spatial standard deviation is below 2/255.
        saturated: more than half of all values are 0 or 255.
        not_finite: a value is NaN or infinite; the other guards then look at the finite values only. Files hold whole numbers and
            never raise it: it is for videos that a program hands over.
        size: T, H, W differ from what was asked for.
    Range: {0, 1}. Direction: lower is better.
    Source: metrics that reward sameness give 1 to frozen and blank videos; VBench has no such guard.
    Blind spots: noise raises none of them; a dark scene that is meant to be dark can be marked as saturated.

    Args:
        video: (T, H, W, 3), uint8 or floats in [0, 1].
        expected: frames, height and width that were asked for; None leaves `size` out.
    """
    frames = as_array(video)
    finite = bool(frames.dtype == np.uint8 or np.isfinite(frames).all())
    size = {} if expected is None else {"guard.size": frames.shape[:3] != tuple(expected)}
    change = spread = ends = 0.0
    before = None
    for frame in frames:  # one by one: floats of a whole clip are a hundred times a processor's cache
        frame = as_float((frame if finite else np.nan_to_num(frame, nan=0.0, posinf=0.0, neginf=0.0))[None])[0]
        change = max(change, 0.0 if before is None else float(np.abs(frame - before).max()))
        spread = max(spread, float(frame.std(axis=(0, 1)).max()))
        ends += float(((frame <= 0.0) | (frame >= 255.0)).mean()) / len(frames)
        before = frame
    raised = {
        "guard.static": change < 1.0,
        "guard.blank": spread < 2.0,
        "guard.saturated": ends > 0.5,
        "guard.not_finite": not finite,
        **size,
    }
    return {name: float(flag) for name, flag in raised.items()}
