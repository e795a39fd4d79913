"""Known damage to a video, in known strengths: what a metric must be seen to notice, or known not to.

Every function takes uint8 frames (T, H, W, 3), a strength and a generator, and returns frames of the same shape; strength 0, or a JPEG
quality of 100, is close to nothing. Draws depend on the generator alone, so one seed damages every clip alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Rounded and clipped to 0 to 255."""
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


def blur(video: np.ndarray, sigma: float, draw: Generator) -> np.ndarray:
    """Gaussian blur of each frame, sigma in pixels."""
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in video])


def noise(video: np.ndarray, deviation: float, draw: Generator) -> np.ndarray:
    """Independent normal noise in grey levels."""
    return to_uint8(video + draw.standard_normal(video.shape) * deviation)


def jpeg(video: np.ndarray, quality: float, draw: Generator) -> np.ndarray:
    """JPEG of each frame by itself."""
    options = [cv2.IMWRITE_JPEG_QUALITY, int(quality)]
    coded = [cv2.imencode(".jpg", frame[..., ::-1], options)[1] for frame in video]
    return np.stack([cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1] for data in coded])


def shuffle(video: np.ndarray, window: float, draw: Generator) -> np.ndarray:
    """Frames in another order within pieces of so many frames; no piece keeps its order."""
    order = []
    for start in range(0, len(video), int(window)):
        piece = np.arange(start, min(start + int(window), len(video)))
        shuffled = draw.permutation(piece)
        order.append(shuffled if len(piece) < 2 or (shuffled != piece).any() else piece[::-1])
    return video[np.concatenate(order)]


def freeze(video: np.ndarray, share: float, draw: Generator) -> np.ndarray:
    """The last share of the frames shows the frame before it; 1 shows the first frame throughout."""
    kept = max(1, round((1 - share) * len(video)))
    return video[np.minimum(np.arange(len(video)), kept - 1)]


def flicker(video: np.ndarray, deviation: float, draw: Generator) -> np.ndarray:
    """Brightness of whole frames, normal, in grey levels."""
    return to_uint8(video + draw.standard_normal((len(video), 1, 1, 1)) * deviation)


def jitter(video: np.ndarray, deviation: float, draw: Generator) -> np.ndarray:
    """Each frame moved by a normal number of pixels along both axes, the border repeated."""
    moved = []
    for frame, (x, y) in zip(video, draw.standard_normal((len(video), 2)) * deviation, strict=True):
        place = np.float32([[1, 0, x], [0, 1, y]])
        moved.append(cv2.warpAffine(frame, place, frame.shape[1::-1], borderMode=cv2.BORDER_REPLICATE))
    return np.stack(moved)


def colour_swap(video: np.ndarray, share: float, draw: Generator) -> np.ndarray:
    """Red and blue exchanged; a share of 0.5 is half-way, where both are equal."""
    return to_uint8(video * (1 - share) + video[..., ::-1] * share)


@dataclass(frozen=True)
class Distortion:
    """How a video is damaged, in which unit its strength is, and the strengths, weakest first."""

    damage: Callable[[np.ndarray, float, Generator], np.ndarray]
    unit: str
    strengths: tuple[float, ...]


DISTORTIONS = {
    "blur": Distortion(blur, "px", (0.5, 1, 2)),
    "noise": Distortion(noise, "levels", (5, 15, 40)),
    "jpeg": Distortion(jpeg, "quality", (50, 30, 10)),
    "shuffle": Distortion(shuffle, "frames", (2, 8)),
    "freeze": Distortion(freeze, "share", (0.5, 1)),
    "flicker": Distortion(flicker, "levels", (4, 16)),
    "jitter": Distortion(jitter, "px", (0.5, 2)),
    "colour swap": Distortion(colour_swap, "share", (0.5, 1)),
}
