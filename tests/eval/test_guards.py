import numpy as np
import pytest
from clips import frozen, moving_disc

from sla2_eval.metrics.guards import guards


def raised(video, expected=(17, 64, 64)) -> set[str]:
    return {name.removeprefix("guard.") for name, flag in guards(video, expected).items() if flag}


def with_hole(value: float) -> np.ndarray:
    video = moving_disc(0) / 255.0
    video[3, 10, 10, 0] = value
    return video


@pytest.mark.parametrize(
    ("video", "flags"),
    [
        (moving_disc(0), set()),
        (frozen(moving_disc(0)), {"static"}),
        (np.full((17, 64, 64, 3), 90, np.uint8), {"static", "blank"}),
        (np.where(moving_disc(0) > 110, 255, 0).astype(np.uint8), {"saturated"}),
        (with_hole(np.nan), {"not_finite"}),
        (with_hole(np.inf), {"not_finite"}),
        (moving_disc(0, frames=9), {"size"}),
        (moving_disc(0)[:, :32], {"size"}),
    ],
)
def test_each_guard_alone(video, flags) -> None:
    assert raised(video) == flags


def test_blank_needs_every_frame_flat() -> None:
    video = np.full((17, 64, 64, 3), 90, np.uint8)
    video[8] = moving_disc(0)[8]
    assert "blank" not in raised(video)
