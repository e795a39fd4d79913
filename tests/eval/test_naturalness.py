import numpy as np
import pytest
from clips import blurred, frozen, held, jpeg, moving_disc, noisy, reversed_in_time

from sla2_eval.metrics.frames import UndefinedError
from sla2_eval.metrics.naturalness import Naturalness


@pytest.fixture(scope="module")
def model() -> Naturalness:
    return Naturalness(16).fit(moving_disc(100 + seed) for seed in range(20))


@pytest.fixture(scope="module")
def clean(model) -> float:
    return mean(model, lambda video: video)


def mean(model, edit) -> float:
    return float(np.mean([model(edit(moving_disc(500 + seed))) for seed in range(6)]))


def test_held_out_clean_lies_within_the_fit(model, clean) -> None:
    own = [model(moving_disc(100 + seed)) for seed in range(20)]
    assert clean < np.percentile(own, 95) * 1.2


@pytest.mark.parametrize("sigma", [0.5, 1, 2, 4])
def test_sees_blur(model, clean, sigma) -> None:
    assert mean(model, lambda video: blurred(video, sigma)) > 1.5 * clean


def test_order_of_noise_blur_and_jpeg(model, clean) -> None:
    for edit, strengths in ((noisy, (15, 40)), (jpeg, (30, 10)), (blurred, (0.5, 1, 2))):
        scores = [mean(model, lambda video, e=edit, s=s: e(video, s)) for s in strengths]
        assert scores == sorted(scores)
        assert scores[0] > 1.5 * clean


@pytest.mark.parametrize("edit", [reversed_in_time, held])
def test_does_not_see_time(model, clean, edit) -> None:
    assert mean(model, edit) == pytest.approx(clean, rel=0.02)


def test_freezing_changes_little(model, clean) -> None:
    # One frame gives a seventeenth of the patches, so the video's own covariance is rougher.
    assert mean(model, frozen) == pytest.approx(clean, rel=0.2)


def test_flat_video_is_undefined(model) -> None:
    with pytest.raises(UndefinedError, match="texture"):
        model(np.full((3, 64, 64, 3), 128, np.uint8))


def test_refuses_too_few_patches_and_unfitted_use() -> None:
    with pytest.raises(ValueError, match="sharp patches"):
        Naturalness(16).fit([moving_disc(0, frames=1)])
    with pytest.raises(ValueError, match="fit the model"):
        Naturalness(16)(moving_disc(0))
