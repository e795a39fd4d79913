import numpy as np
import pytest
from clips import moving_disc, noisy

from sla2_eval.metrics.fidelity import fidelity
from sla2_eval.metrics.frames import UndefinedError


def test_identity_reaches_cap_and_one() -> None:
    video = moving_disc(0, frames=5)
    assert fidelity(video, video) == pytest.approx(
        {"fidelity.psnr": 100, "fidelity.psnr_pooled": 100, "fidelity.ssim": 1}
    )


def test_values_of_a_known_error() -> None:
    video = np.full((2, 16, 16, 3), 100, np.uint8)
    other = video.copy()
    other[0] += 51  # a fifth of the range in one of two frames: 13.98 dB there, the cap in the other
    scores = fidelity(other, video)
    assert scores["fidelity.psnr"] == pytest.approx((10 * np.log10(25) + 100) / 2, abs=1e-3)
    assert scores["fidelity.psnr_pooled"] == pytest.approx(10 * np.log10(50), abs=1e-3)


def test_symmetric_and_falling_with_noise() -> None:
    video = moving_disc(0, frames=5)
    assert fidelity(noisy(video, 15), video) == pytest.approx(fidelity(video, noisy(video, 15)), rel=1e-5)
    scores = [fidelity(noisy(video, s), video) for s in (5, 15, 40)]
    for name in scores[0]:
        values = [score[name] for score in scores]
        assert values == sorted(values, reverse=True)


def test_another_scene_is_far_below_light_noise() -> None:
    video, other = moving_disc(0, frames=5), moving_disc(1, frames=5)
    assert fidelity(other, video)["fidelity.psnr"] < fidelity(noisy(video, 15), video)["fidelity.psnr"] - 5


@pytest.mark.parametrize("cut", [np.s_[:4], np.s_[:, :32], np.s_[:, :, :32]])
def test_refuses_another_shape(cut) -> None:
    video = moving_disc(0, frames=5)
    with pytest.raises(ValueError, match="one shape"):
        fidelity(video[cut], video)


def test_small_frames_are_undefined() -> None:
    with pytest.raises(UndefinedError, match="11"):
        fidelity(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8))
