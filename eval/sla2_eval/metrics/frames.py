"""What every video metric takes: frames of shape (T, H, W, 3), uint8, or floats in [0, 1]."""

import itertools

import numpy as np


class UndefinedError(ValueError):
    """A metric has no value on this video; the message is the reason that goes into the record."""


def as_array(video) -> np.ndarray:
    """Check a video and return it as a numpy array of its own dtype.

    Args:
        video: numpy array or torch tensor (T, H, W, 3), RGB; uint8, or floating point in [0, 1].

    Raises:
        ValueError: for another shape or an integer type other than uint8.
    """
    if hasattr(video, "detach"):
        video = video.detach().cpu().numpy()
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"a video has shape (T, H, W, 3) with no empty axis, got {video.shape}")
    if video.dtype != np.uint8 and not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"frames are uint8, or floats in [0, 1], got {video.dtype}")
    return video


def as_float(video) -> np.ndarray:
    """Frames as float32 on the scale 0 to 255.

    Raises:
        UndefinedError: when a value is not finite.
    """
    video = as_array(video)
    if video.dtype == np.uint8:
        return video.astype(np.float32)
    if not np.isfinite(video).all():
        raise UndefinedError("the video holds values that are not finite")
    return video.astype(np.float32) * 255.0


def as_uint8(video) -> np.ndarray:
    """Frames as uint8, floats rounded and clipped.

    Raises:
        UndefinedError: when a value is not finite.
    """
    video = as_array(video)
    return video if video.dtype == np.uint8 else np.clip(np.rint(as_float(video)), 0, 255).astype(np.uint8)


def luma(video) -> np.ndarray:
    """Rec. 601 luma, float32 (T, H, W) on the scale 0 to 255."""
    return as_float(video) @ np.array([0.299, 0.587, 0.114], np.float32)


def middle_frames(length: int, count: int) -> list[int]:
    """Indices of `count` frames, the middle one of each equal piece, as VBench samples clips; the last repeats if T < count."""
    if length < count:
        return list(range(length)) + [length - 1] * (count - length)
    edges = np.floor(np.linspace(0, length, count + 1)).astype(int)
    return [int((low + high - 1) // 2) for low, high in itertools.pairwise(edges)]
