"""Video files through PyAV: H.264 for people, FFV1 for metrics, and reading whatever ffmpeg reads."""

import itertools
import math
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from sla2.errors import UserError
from sla2.files import atomic_path

CRF = "12"  # near lossless to the eye, and recorded here because the codec changes metrics


def write_mp4(path: str | Path, frames: Tensor, fps: float) -> None:
    """Write uint8 RGB frames (T, H, W, 3), even sizes, as H.264 yuv420p."""
    _write(path, frames, fps, "libx264", "yuv420p", {"crf": CRF, "preset": "medium"})


def write_lossless(path: str | Path, frames: Tensor, fps: float) -> None:
    """Write uint8 RGB frames (T, H, W, 3) as FFV1 in Matroska, bit for bit."""
    _write(path, frames, fps, "ffv1", "bgr0", {})


def _write(path: str | Path, frames: Tensor, fps: float, codec: str, pixels: str, options: dict[str, str]) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, must be uint8 (T, H, W, 3)")
    # bitexact keeps encoder versions and random ids out of the file.
    bitexact = {"fflags": "+bitexact"}
    with atomic_path(path) as temporary, av.open(str(temporary), "w", options=bitexact) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1
        for frame in frames.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_video(path: str | Path, seconds: float = math.inf) -> tuple[Tensor, float]:
    """Frames of a file, all or those of its first seconds.

    Returns:
        uint8 RGB frames (T, H, W, 3) and the frame rate in frames/s.

    Raises:
        UserError: when the file cannot be decoded or holds no frame.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            last = math.ceil(seconds * fps) + 1 if seconds * fps < math.inf else None
            decoded = itertools.islice(container.decode(stream), last)
            frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in decoded]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"{path}: cannot be read as a video ({error}); replace or remove it") from error
    if not frames or fps <= 0:
        raise UserError(f"{path}: holds no video frames; replace or remove it")
    return torch.stack(frames), fps


def resample(frames: Tensor, fps: float, wanted_fps: float, count: int, start_s: float = 0.0) -> Tensor | None:
    """`count` frames at `wanted_fps` from `start_s` on, each the nearest in time; None when the clip is too short."""
    times = start_s + torch.arange(count, dtype=torch.float64) / wanted_fps
    indices = (times * fps).round().long()
    return frames[indices] if int(indices[-1]) < len(frames) else None


def fit(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 frames (T, H, W, 3), antialiased, until they cover height x width, and crop the centre."""
    scale = max(height / frames.shape[1], width / frames.shape[2])
    size = (max(height, math.ceil(frames.shape[1] * scale)), max(width, math.ceil(frames.shape[2] * scale)))
    if size != tuple(frames.shape[1:3]):
        images = frames.permute(0, 3, 1, 2).float()
        images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        frames = images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, top : top + height, left : left + width].contiguous()
