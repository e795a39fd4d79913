import numpy as np
import pytest
from clips import assert_order, blurred, frozen, held, jpeg, moving_disc, noisy, reversed_in_time
from scipy.stats import spearmanr

from sla2_eval.metrics.frames import UndefinedError
from sla2_eval.metrics.naturalness import Naturalness


def scene(seed: int) -> np.ndarray:
    """A textured clip whose every frame has 64 patches of 16 pixels: with the 16 of a small frame, one frame is no sample of the clip."""
    return moving_disc(seed, frames=9, side=128)


@pytest.fixture(scope="module")
def model() -> Naturalness:
    return Naturalness(16).fit(scene(100 + seed) for seed in range(40))


@pytest.fixture(scope="module")
def clean(model) -> list[float]:
    return scores(model, lambda video: video)


def scores(model, edit) -> list[float]:
    """Of eight scenes that were not fitted."""
    return [model(edit(scene(500 + seed))) for seed in range(8)]


def test_held_out_clean_lies_within_the_fit(model, clean) -> None:
    assert np.mean(clean) < np.percentile([model(scene(100 + seed)) for seed in range(40)], 95)


@pytest.mark.parametrize(
    ("edit", "strengths"), [(noisy, (5, 15, 40)), (jpeg, (30, 10)), (blurred, (0.5, 1, 2, 4))],
    ids=["noise", "jpeg", "blur"],
)  # fmt: skip
def test_sees_every_level_of_damage(model, clean, edit, strengths) -> None:
    for strength in strengths:
        damaged = scores(model, lambda video, s=strength: edit(video, s))
        assert np.mean(damaged) >= 1.5 * np.mean(clean)
        assert_order(clean, damaged)


@pytest.mark.parametrize(("edit", "strengths"), [(noisy, (5, 15, 40)), (jpeg, (30, 10))], ids=["noise", "jpeg"])
def test_order_of_noise_and_jpeg(model, edit, strengths) -> None:
    assert_order(*(scores(model, lambda video, s=s: edit(video, s)) for s in strengths))


def test_rank_of_blur(model, clean) -> None:
    means = [np.mean(clean), *(np.mean(scores(model, lambda video, s=s: blurred(video, s))) for s in (0.5, 1, 2))]
    assert spearmanr([0, 0.5, 1, 2], means).statistic >= 0.9


@pytest.mark.parametrize("edit", [frozen, reversed_in_time, held])
def test_does_not_see_time(model, clean, edit) -> None:
    assert np.mean(scores(model, edit)) == pytest.approx(np.mean(clean), rel=0.02)


def test_flat_video_is_undefined(model) -> None:
    with pytest.raises(UndefinedError, match="texture"):
        model(np.full((3, 64, 64, 3), 128, np.uint8))


def test_refuses_too_few_patches_and_unfitted_use() -> None:
    with pytest.raises(ValueError, match="sharp patches"):
        Naturalness(16).fit([moving_disc(0, frames=1)])
    with pytest.raises(ValueError, match="fit the model"):
        Naturalness(16)(moving_disc(0))
