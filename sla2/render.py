"""Pixels of procedural scenes, vectorised over clips and frames on any device.

Shapes are signed distance functions, so edges are anti-aliased over one pixel at any resolution. Only elementwise arithmetic and
gathers touch pixels: a clip has the same bits alone and in a batch.
Legend: B clips, T frames, H, W; u, v coordinates in a shape's own frame, in radii; other lengths in short sides (`sla2.scenes`).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sla2.backdrop import grain, light
from sla2.scenes import position

CHUNK_PIXELS = 300_000  # pixels drawn at once, so that the float planes of a pass stay in a core's cache
GPU_CHUNK_PIXELS = 30_000_000  # what fills a GPU, where a small pass costs what a large one does
PERIOD = 0.62  # of stripes and dots, in radii: 5 px on the smallest shapes of a 64 px frame
SHADE = 0.4  # brightness of a stripe or dot, which keeps the shape's hue
RIM = 0.11  # width of the unbroken edge of a striped or dotted shape, in radii, so that its outline stays readable


def render(scenes: list[dict], *, frames: int, height: int, width: int, fps: float, device: str = "cpu") -> Tensor:
    """Draw clips.

    Returns:
        uint8 (B, T, H, W, 3) on `device`; between devices a pixel may differ by one level.
    """
    out = torch.empty((len(scenes), frames, height, width, 3), dtype=torch.uint8, device=device)
    most = GPU_CHUNK_PIXELS if torch.device(device).type == "cuda" else CHUNK_PIXELS
    for clips, steps in _chunks(len(scenes), frames, height * width, most):
        chunk, times = scenes[clips], torch.arange(frames, dtype=torch.float64)[steps] / fps
        backdrop = light(chunk, times, height, width, device)
        layers = [_layer(chunk, which, times, height, width, device) for which in _depths(chunk)]
        noise = grain(chunk, range(frames)[steps], height, width, device)
        for channel in range(3):
            value = backdrop * _column([scene["background"]["rgb"][channel] for scene in chunk], device)
            for cover, shade, rgb in layers:
                value = value + cover * (shade * _column([color[channel] for color in rgb], device) - value)
            out[clips, steps, ..., channel] = (value + noise).round_().clamp_(0, 255)
    return out


def masks(scenes: list[dict], *, frames: int, height: int, width: int, fps: float, device: str = "cpu") -> Tensor:
    """Visible share of every pixel that each shape covers.

    Returns:
        float32 (B, 2, T, H, W) in [0, 1]; the second shape hides the first; zero where there is no second shape.
    """
    times = torch.arange(frames, dtype=torch.float64) / fps
    out = torch.zeros((len(scenes), 2, frames, height, width), device=device)
    for which in _depths(scenes):
        cover, _, _ = _layer(scenes, which, times, height, width, device)
        out[:, :which] *= 1 - cover[:, None]
        out[:, which] = cover
    return out


def tracks(scenes: list[dict], *, frames: int, height: int, width: int, fps: float) -> Tensor:
    """Centres of the shapes.

    Returns:
        float64 (B, 2, T, 2), x and y in px with the centre of the first pixel at 0; NaN where there is no second shape.
    """
    short = min(height, width)
    out = torch.full((len(scenes), 2, frames, 2), math.nan, dtype=torch.float64)
    for which in _depths(scenes):
        for index, scene in enumerate(scenes):
            if which < len(scene["shapes"]):
                shape, extent = scene["shapes"][which], (width / short, height / short)
                path = [position(shape, step / fps, extent) for step in range(frames)]
                out[index, which] = torch.tensor(path, dtype=torch.float64) * short - 0.5
    return out


def _chunks(clips: int, frames: int, pixels: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Clips and frames of passes of at most `most` pixels, or of one frame."""
    steps = max(1, min(frames, most // pixels))
    count = max(1, most // (pixels * frames))
    for first in range(0, clips, count):
        for start in range(0, frames, steps):
            yield slice(first, first + count), slice(start, min(frames, start + steps))


def _depths(scenes: list[dict]) -> range:
    return range(max(len(scene["shapes"]) for scene in scenes))


def _column(values: list, device: str) -> Tensor:
    """One number a clip, as (B, 1, 1, 1)."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None, None]


def _layer(scenes: list[dict], which: int, times: Tensor, height: int, width: int, device: str):
    """Cover and shade (B, T, H, W) of one depth, and the clips' colours there; cover is 0 for clips without that shape."""
    size = (len(scenes), len(times), height, width)
    cover, shade = torch.zeros(size, device=device), torch.ones(size, device=device)
    groups: dict[tuple[str, str], list[int]] = {}
    for index, scene in enumerate(scenes):
        if which < len(scene["shapes"]):
            shape = scene["shapes"][which]
            groups.setdefault((shape["shape"], shape["texture"]), []).append(index)
    for (name, texture), members in groups.items():
        shapes = [scenes[index]["shapes"][which] for index in members]
        u, v = _local(shapes, times, height, width, device)
        pixels = _column([shape["radius"] * min(height, width) for shape in shapes], device)
        distance = DISTANCES[name](u, v)
        cover[members] = _inside(distance, pixels)
        if texture != "plain":
            pattern = torch.maximum(PATTERNS[texture](u, v), distance + RIM)
            shade[members] = 1 - (1 - SHADE) * _inside(pattern, pixels)
    colors = [scene["shapes"][which]["rgb"] if which < len(scene["shapes"]) else (0, 0, 0) for scene in scenes]
    return cover, shade, colors


def _local(shapes: list[dict], times: Tensor, height: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Coordinates u, v (B, T, H, W) of every pixel as seen from the moving, turning shapes."""
    short = min(height, width)
    extent = (width / short, height / short)
    paths = [[position(shape, seconds, extent) for seconds in times.tolist()] for shape in shapes]
    centre = torch.tensor(paths, dtype=torch.float64)
    angle = torch.tensor([[shape["angle"] + shape["turn"] * t for t in times.tolist()] for shape in shapes])
    radius = torch.tensor([shape["radius"] for shape in shapes], dtype=torch.float64)[:, None, None]
    x = ((torch.arange(width) + 0.5) / short - centre[..., :1]) / radius
    y = ((torch.arange(height) + 0.5) / short - centre[..., 1:]) / radius
    x, y = x.float().to(device)[:, :, None, :], y.float().to(device)[:, :, :, None]
    turned = (2 * math.pi * angle).to(device)[..., None, None]
    cos, sin = turned.cos(), turned.sin()
    return cos * x + sin * y, cos * y - sin * x


def _inside(distance: Tensor, pixels: Tensor) -> Tensor:
    """Share of a pixel inside an edge; `distance` to it in radii, negative inside, `pixels` the radius in px."""
    return (0.5 - distance * pixels).clamp_(0, 1)


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.85


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    """Equilateral, corners 1.2 radii from its centre of gravity."""
    return torch.maximum(v, math.sqrt(0.75) * u.abs() - 0.5 * v) - 0.6


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points at 1.15 radii, notches at 0.52; every plane is folded onto one half of a point, then it is a single edge."""
    u, mirror = u.abs(), (math.cos(math.radians(36)), math.sin(math.radians(36)))
    for _ in range(2):  # two folds along the line from the centre through a notch bring all points onto the upper one
        over = (mirror[0] * u + mirror[1] * v).clamp_(min=0)
        u, v = (u - 2 * mirror[0] * over).abs(), v - 2 * mirror[1] * over
    tip, notch = (0.0, -1.15), (0.52 * math.sin(math.radians(36)), -0.52 * math.cos(math.radians(36)))
    along = (notch[0] - tip[0], notch[1] - tip[1])
    return ((u - tip[0]) * -along[1] + (v - tip[1]) * along[0]) / -math.hypot(*along)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    u, v = u.abs(), v.abs()
    return torch.maximum(torch.minimum(u, v) - 0.33, torch.maximum(u, v) - 0.95)


DISTANCES = {
    "circle": lambda u, v: torch.hypot(u, v) - 1,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.7).abs() - 0.3,
}


def _cell(u: Tensor) -> Tensor:
    return (u / PERIOD - (u / PERIOD).round()) * PERIOD


PATTERNS = {
    "striped": lambda u, v: _cell(u).abs() - PERIOD / 4,
    "dotted": lambda u, v: torch.hypot(_cell(u), _cell(v)) - PERIOD / 3.4,
}
