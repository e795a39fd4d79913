import numpy as np
import pytest
from clips import assert_order, flickering, frozen, moving_disc, noisy, reversed_in_time, shuffled

from sla2_eval.metrics.flicker import temporal_flickering
from sla2_eval.metrics.frames import UndefinedError


def scores(edit, speed=(1.5, 0.7)) -> list[float]:
    """Of six scenes."""
    return [temporal_flickering(edit(moving_disc(seed, speed=speed))) for seed in range(6)]


def same(video):
    return video


def test_hand_made_array() -> None:
    video = np.zeros((3, 1, 2, 3), np.uint8)
    video[1] = 51
    video[2, 0, 0] = 255
    # Changes: 51 everywhere, then 204 at one pixel and 51 at the other.
    expected = 1 - np.mean([51, (204 + 51) / 2]) / 255
    assert temporal_flickering(video) == pytest.approx(expected, abs=1e-6)
    assert temporal_flickering(video / 255.0) == pytest.approx(expected, abs=1e-6)


def test_frozen_video_scores_one() -> None:
    assert scores(frozen) == [1.0] * 6


def test_reversal_and_constant_do_not_matter() -> None:
    video = np.clip(moving_disc(0), 40, 200)
    assert temporal_flickering(reversed_in_time(video)) == temporal_flickering(video)
    assert temporal_flickering(video + 30) == temporal_flickering(video)


def test_order_of_noise() -> None:
    assert_order(*(scores(lambda video, s=s: noisy(video, s)) for s in (40, 15, 5, 0)))


def test_order_of_temporal_edits() -> None:
    clean = scores(same)
    assert_order(scores(lambda video: flickering(video, 8)), clean)
    assert_order(scores(shuffled), clean)
    assert_order(clean, scores(same, speed=(0.5, 0.2)))


def test_single_frame_is_undefined() -> None:
    with pytest.raises(UndefinedError, match="two frames"):
        temporal_flickering(moving_disc(0)[:1])


@pytest.mark.parametrize(
    ("video", "error"),
    [
        (np.zeros((3, 4, 4), np.uint8), r"\(T, H, W, 3\)"),
        (np.zeros((2, 4, 4, 3), np.int32), "uint8"),
        (np.full((2, 4, 4, 3), np.nan, np.float32), "not finite"),
    ],
)
def test_refuses_what_is_no_video(video, error) -> None:
    with pytest.raises(ValueError, match=error):
        temporal_flickering(video)
