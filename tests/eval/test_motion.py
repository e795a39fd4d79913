import cv2
import numpy as np
import pytest
from clips import (
    assert_order,
    flickering,
    frozen,
    held,
    jittering,
    moving_disc,
    noisy,
    reversed_in_time,
    shuffled,
    texture,
    to_uint8,
)

from sla2 import scenes
from sla2.render import render
from sla2_eval.metrics.frames import UndefinedError
from sla2_eval.metrics.motion import _dis, _grey, dynamic_degree, motion_smoothness

SMOOTH, GAIN = "proxy.motion_smoothness_dis", "proxy.interp_gain"
DYNAMIC, FLOW = "proxy.dynamic_degree_dis", "proxy.flow_top5"


def smoothness(edit) -> list[float]:
    """Of six scenes."""
    return [motion_smoothness(edit(moving_disc(seed)))[SMOOTH] for seed in range(6)]


def rolling(speed: float, side: int = 128, frames: int = 9) -> np.ndarray:
    """A torus texture that moves to the right by `speed` pixels a frame."""
    ground = to_uint8(texture(256, np.random.default_rng(7)) * 35 + 128)
    ground = cv2.resize(ground, (side, side), interpolation=cv2.INTER_AREA) if side < 256 else ground
    shifts = [np.float32([[1, 0, speed * t], [0, 1, 0]]) for t in range(frames)]
    return np.stack([cv2.warpAffine(ground, m, (side, side), borderMode=cv2.BORDER_WRAP) for m in shifts])


def test_smoothness_of_a_frozen_video_is_one_and_has_no_gain() -> None:
    scores = motion_smoothness(frozen(moving_disc(0)))
    assert scores[SMOOTH] == 1.0
    assert isinstance(scores[GAIN], UndefinedError)
    assert "nothing moves" in str(scores[GAIN])


def test_smoothness_of_an_integer_translation() -> None:
    scores = motion_smoothness(rolling(2.0, side=256))
    assert scores[SMOOTH] >= 0.995
    assert scores[GAIN] > 0.8


def test_smoothness_hardly_changes_under_reversal() -> None:
    assert smoothness(reversed_in_time) == pytest.approx(smoothness(lambda video: video), abs=1e-3)


def test_smoothness_falls_with_noise() -> None:
    assert_order(*(smoothness(lambda video, s=s: noisy(video, s)) for s in (40, 15, 5, 0)))


@pytest.mark.parametrize(
    "edit", [shuffled, held, lambda video: jittering(video, 2), lambda video: flickering(video, 8)],
    ids=["shuffle", "hold", "jitter", "flicker"],
)  # fmt: skip
def test_smoothness_falls_with_temporal_damage(edit) -> None:
    assert_order(smoothness(edit), smoothness(lambda video: video))


def test_smoothness_ignores_the_last_frame_of_an_even_number() -> None:
    video = moving_disc(0, frames=8)
    changed = video.copy()
    changed[-1] = 0
    assert motion_smoothness(changed) == motion_smoothness(video) == motion_smoothness(video[:7])


def test_too_short_is_undefined() -> None:
    video = moving_disc(0, frames=2)
    with pytest.raises(UndefinedError, match="three frames"):
        motion_smoothness(video)
    with pytest.raises(UndefinedError, match="three frames"):
        dynamic_degree(video, fps=8)


def test_frozen_video_has_no_motion() -> None:
    assert dynamic_degree(frozen(moving_disc(0)), fps=8) == {DYNAMIC: 0.0, FLOW: 0.0}


def test_flow_measures_the_known_speed_and_grows_with_it() -> None:
    flows = [dynamic_degree(rolling(speed), fps=8)[FLOW] for speed in (1.0, 2.0, 4.0)]
    assert flows == sorted(flows)
    assert flows == pytest.approx([1.0, 2.0, 4.0], rel=0.1)


def test_dynamic_threshold_is_crossed_at_the_analytic_speed() -> None:
    threshold = 6 * 128 / 256
    assert dynamic_degree(rolling(threshold * 0.85), fps=8)[DYNAMIC] == 0.0
    assert dynamic_degree(rolling(threshold * 1.15), fps=8)[DYNAMIC] == 1.0


def test_dynamic_does_not_depend_on_resolution() -> None:
    for speed in (1.5, 5.0):
        small, large = dynamic_degree(rolling(speed), fps=8), dynamic_degree(rolling(2 * speed, side=256), fps=8)
        assert small[DYNAMIC] == large[DYNAMIC] == float(speed > 3)


def test_frame_rate_sets_the_stride() -> None:
    video = rolling(1.0, frames=13)
    assert dynamic_degree(video, fps=16)[FLOW] == pytest.approx(2 * dynamic_degree(video, fps=8)[FLOW], rel=0.1)


def test_speed_of_procedural_scenes() -> None:
    """The ground of a panning camera, textured and without grain: the median flow is the scene's own speed within 10 %."""
    video = {"frames": 9, "height": 128, "width": 128, "fps": 8}
    setting = scenes.SIMPLE | {"pan": 1.0, "pan_speed": 0.25, "contrast": 0.6, "grain": 0.0, "sizes": {"small": 0.2}}
    for index in range(6):
        scene = scenes.sample(setting, video, 0, "heldout", index)
        grey = _grey(render([scene], **video)[0].numpy())
        flows = _dis(grey, [(t, t + 1) for t in range(8)])
        measured = np.median([np.linalg.norm(flow, axis=-1) for flow in flows])
        true = np.hypot(*scene["pan"]["velocity"]) * 128 / video["fps"]
        assert measured == pytest.approx(true, rel=0.1)
