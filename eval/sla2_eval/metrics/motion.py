"""Motion smoothness and dynamic degree by the rules of VBench, with OpenCV's DIS flow in place of learned networks."""

import math

import cv2
import numpy as np

from sla2_eval.metrics.frames import UndefinedError, as_float, as_uint8


def _dis(grey: np.ndarray, pairs: list[tuple[int, int]]) -> list[np.ndarray]:
    """Flow (H, W, 2) in pixels of each (from, to) pair of uint8 frames (T, H, W)."""
    # finest scale 0 (full resolution): the preset stops at half of it, too coarse for frames of 64 pixels.
    engine = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    engine.setFinestScale(0)
    return [engine.calc(grey[a], grey[b], None) for a, b in pairs]


def _grey(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def motion_smoothness(video) -> dict[str, float | UndefinedError]:
    """Card: `proxy.motion_smoothness_dis`, `proxy.interp_gain`.

    Definition: how well each odd frame is predicted from its two neighbours by moving both half-way along the flow between them.
    Formula: e_flow = mean|odd - round(mean of the two warped neighbours)|, e_plain the same without warping, averaged over the
        odd frames between two even ones; smoothness = 1 - e_flow / 255; interp_gain = 1 - e_flow / e_plain.
    Range: smoothness [0, 1], saturated near 1; interp_gain (-inf, 1], above 0 where following the motion helps.
    Direction: higher is smoother.
    Source: the protocol of VBench `motion_smoothness` with OpenCV DIS flow instead of AMT-S, so not comparable with it.
    UndefinedError: fewer than three frames; interp_gain also where neighbours equal the frame between them (nothing moves), given as
        its value. With an even number of frames the last one is not judged.
    Blind spots: grain sets a floor that hides held frames (use interp_gain); frozen video scores 1; blur raises it slightly;
        pixels that leave the frame are replaced by the border.

    Args:
        video: (T, H, W, 3), uint8 or floats in [0, 1].

    Raises:
        UndefinedError: as above.
    """
    frames = as_uint8(video)
    if len(frames) < 3:
        raise UndefinedError("motion smoothness needs three frames")
    grey, exact = _grey(frames), as_float(frames)
    odd = range(1, len(frames) - 1, 2)
    forward = _dis(grey, [(k - 1, k + 1) for k in odd])
    backward = _dis(grey, [(k + 1, k - 1) for k in odd])
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]].astype(np.float32)

    def warp(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
        x, y = columns - flow[..., 0] / 2, rows - flow[..., 1] / 2
        return cv2.remap(frame, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    moved, still = [], []
    for k, there, back in zip(odd, forward, backward, strict=True):
        before, after = exact[k - 1], exact[k + 1]
        moved.append(np.abs(exact[k] - np.rint((warp(before, there) + warp(after, back)) / 2)).mean(dtype=np.float64))
        still.append(np.abs(exact[k] - np.rint((before + after) / 2)).mean(dtype=np.float64))
    gain: float | UndefinedError = UndefinedError(
        "nothing moves: every judged frame equals the mean of its neighbours, so there is no error that following motion could mend"
    )
    if np.mean(still) > 0:
        gain = float(1 - np.mean(moved) / np.mean(still))
    return {"proxy.motion_smoothness_dis": float(1 - np.mean(moved) / 255), "proxy.interp_gain": gain}


def dynamic_degree(video, fps: float) -> dict[str, float]:
    """Card: `proxy.dynamic_degree_dis`, `proxy.flow_top5`.

    Definition: whether enough of the clip moves fast enough, and how fast its fastest parts move.
    Formula: frames every max(1, round(fps / 8)); per pair of them s = mean of the 5 % largest |flow|; dynamic = 1 when at least
        max(1, round(4 n / 16)) of the n - 1 pairs have s > 6 min(H, W) / 256; flow_top5 = mean of s.
    Range: dynamic {0, 1}; flow_top5 [0, inf) pixels per step (an eighth of a second). Direction: none; a motion amount.
    Source: VBench `dynamic_degree` (commit 45e79ec) with DIS flow instead of RAFT; the floor of one pair is ours, as VBench
        calls any two-frame clip dynamic.
    UndefinedError: fewer than three frames after the stride.
    Blind spots: the frame rate decides the stride; grain on smooth areas is read as motion; camera and object are not told apart.

    Args:
        video: (T, H, W, 3), uint8 or floats in [0, 1].
        fps: frames per second of the video.

    Raises:
        UndefinedError: as above.
    """
    frames = as_uint8(video)[:: max(1, round(fps / 8))]
    if len(frames) < 3:
        raise UndefinedError(f"dynamic degree needs three frames at 8 per second, got {len(frames)}")
    height, width = frames.shape[1:3]
    top = math.ceil(0.05 * height * width)
    speeds = []
    for flow in _dis(_grey(frames), [(k, k + 1) for k in range(len(frames) - 1)]):
        magnitude = np.linalg.norm(flow, axis=-1).ravel()
        speeds.append(float(np.partition(magnitude, -top)[-top:].mean()))
    fast = sum(speed > 6 * min(height, width) / 256 for speed in speeds)
    return {
        "proxy.dynamic_degree_dis": float(fast >= max(1, round(4 * len(frames) / 16))),
        "proxy.flow_top5": float(np.mean(speeds)),
    }
