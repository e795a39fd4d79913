"""The grammar of procedural scenes: parameters, captions, and a renderer vectorised over clips.

A scene is a plain dict, so it is kept as JSON beside its caption and is what oracle metrics compare with. Lengths are fractions
of the frame's smaller side, times run from 0 to 1 over the clip. The same (seed, split, index) gives the same scene everywhere.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sla2.flow import generator

COLORS = {
    "red": (0.88, 0.14, 0.14),
    "green": (0.13, 0.70, 0.22),
    "blue": (0.16, 0.30, 0.92),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.60, 0.20, 0.75),
    "orange": (0.96, 0.52, 0.10),
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.05),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # y grows downwards
SPEEDS = {"slowly": 0.3, "": 0.5, "fast": 0.75}  # way over the clip
SIZES = {"small": 0.13, "": 0.2, "large": 0.26}  # radius
TEXTURES = ("", "striped", "dotted")
GROUND = 0.45  # mean grey of the background
_SPLITS = {"train": 0, "heldout": 1, "judge": 2, "judge_heldout": 3}

# What a scene may contain; config key `data.scene` replaces entries.
SIMPLE = {
    "colors": ["red", "green", "blue", "yellow"],
    "shapes": ["circle", "square", "triangle"],
    "directions": ["right", "left", "up", "down"],
    "speeds": [""],
    "sizes": [""],
    "textures": [""],
    "second_shape": 0.0,
    "rotation": 0.0,
    "bounce": 0.0,
    "pan": 0.0,
    "spread": 0.3,
    "grain": 0.01,
}


def sample_scene(seed: int, split: str, index: int, choices: dict) -> dict:
    """Draw the scene of a clip.

    Args:
        split: train, heldout, judge or judge_heldout; each has its own stream of draws.
        choices: as `SIMPLE`; probabilities in [0, 1], `spread` is the range of the path's offset in frame sides.
    """
    draw = generator(seed, _SPLITS[split], index)

    def uniform() -> float:
        return float(torch.rand((), generator=draw, dtype=torch.float64))

    def one(values: list) -> str:
        return values[int(uniform() * len(values))]

    def thing(color_not: str | None) -> dict:
        colors = [color for color in choices["colors"] if color != color_not]
        return {
            "color": one(colors),
            "shape": one(choices["shapes"]),
            "size": one(choices["sizes"]),
            "texture": one(choices["textures"]),
            "direction": one(choices["directions"]),
            "speed": one(choices["speeds"]),
            "offset": (uniform() - 0.5) * choices["spread"],
            "rotation": (1.0 if uniform() < 0.5 else -1.0) if uniform() < choices["rotation"] else 0.0,
            "bounce": uniform() < choices["bounce"],
        }

    first = thing(None)
    things = [first]
    if uniform() < choices["second_shape"]:
        things.append(thing(first["color"]))  # drawn later, so in front
    pan = one(["left", "right"]) if uniform() < choices["pan"] else ""
    return {"things": things, "pan": pan, "grain": choices["grain"], "ground_seed": int(uniform() * 2**31)}


def caption(scene: dict) -> str:
    """The scene in words, the same words in the same order every time."""
    parts = []
    for thing in scene["things"]:
        words = [
            "a",
            thing["size"],
            thing["texture"],
            thing["color"],
            thing["shape"],
            "moves",
            thing["direction"],
            thing["speed"],
        ]
        words += ["turning"] if thing["rotation"] else []
        words += ["and bounces"] if thing["bounce"] else []
        parts.append(" ".join(word for word in words if word))
    if scene["pan"]:
        parts.append(f"the camera pans {scene['pan']}")
    return ", ".join(parts)


def centres(thing: dict, frames: int) -> Tensor:
    """Centre of a shape (T, 2) as (x, y) in frame sides: a straight path through the middle, offset sideways."""
    way = SPEEDS[thing["speed"]]
    t = torch.linspace(-0.5, 0.5, frames)
    if thing["bounce"]:
        t = 0.5 - 2 * (t.abs() - 0.25).abs() - 0.25  # there and back
    x, y = DIRECTIONS[thing["direction"]]
    path = torch.stack([t * way * x, t * way * y], -1)
    sideways = torch.tensor([abs(y), abs(x)]) * thing["offset"]
    return 0.5 + path + sideways


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed distance to a shape's border, negative inside; x, y relative to its centre."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    if shape == "triangle":
        sides = (x.abs() * math.sqrt(3) - y) / 2 - 0.58 * radius
        return torch.maximum(sides, y - 0.58 * radius)
    if shape == "cross":
        bar = torch.maximum(x.abs() - radius, y.abs() - 0.36 * radius)
        return torch.minimum(bar, torch.maximum(y.abs() - radius, x.abs() - 0.36 * radius))
    angle = torch.atan2(x, -y)
    spoke = torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5  # five points
    r = torch.hypot(x, y)
    return r * torch.cos(spoke.abs() - math.pi / 5 * 0.5) * 0.95 - radius * 0.5 * (
        1 + (1 - spoke.abs() / (math.pi / 5)) * 0.6
    )


def _pattern(texture: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Brightness of a shape's surface."""
    u, v = x / radius, y / radius
    if texture == "striped":
        return 0.75 + 0.25 * torch.sin(4.5 * (u + v)).sign()
    if texture == "dotted":
        return 1 - 0.55 * ((torch.sin(5 * u) * torch.sin(5 * v)).abs() > 0.55).float()
    return torch.ones_like(u)


def render(scenes: list[dict], frames: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Render clips.

    Returns:
        uint8 RGB frames (B, T, H, W, 3). Background texture and grain come from the scene's `ground_seed`.
    """
    return torch.stack([_render(scene, frames, height, width, device) for scene in scenes])


def _render(scene: dict, frames: int, height: int, width: int, device: torch.device | str) -> Tensor:
    draw = torch.Generator().manual_seed(scene["ground_seed"])
    side = min(height, width)
    rows = ((torch.arange(height) + 0.5) - height / 2) / side + 0.5
    columns = ((torch.arange(width) + 0.5) - width / 2) / side + 0.5
    pan = {"": 0.0, "left": -0.35, "right": 0.35}[scene["pan"]]
    shift = torch.linspace(-0.5, 0.5, frames) * pan * side
    image = _ground(draw, frames, height, width, shift).to(device)
    grain = (torch.randn(frames, height, width, 1, generator=draw) * scene["grain"]).to(device)
    y, x = (axis.to(device) for axis in torch.meshgrid(rows, columns, indexing="ij"))
    for thing in scene["things"]:
        centre = centres(thing, frames).to(device)
        radius = SIZES[thing["size"]]
        dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]  # (T, H, W)
        turn = thing["rotation"] * torch.linspace(0, math.pi, frames, device=device)[:, None, None]
        dx, dy = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
        cover = (0.5 - _distance(thing["shape"], dx, dy, radius) * side).clamp(0, 1)[..., None]
        surface = (
            torch.tensor(COLORS[thing["color"]], device=device) * _pattern(thing["texture"], dx, dy, radius)[..., None]
        )
        image = image * (1 - cover) + surface * cover
    return ((image + grain).clamp(0, 1) * 255).round().to(torch.uint8)


def _ground(draw: torch.Generator, frames: int, height: int, width: int, shift: Tensor) -> Tensor:
    """Smooth grey texture (T, H, W, 3) with a light tint, moved sideways by `shift` pixels."""
    margin = int(shift.abs().max().ceil()) + 1
    noise = torch.randn(1, 1, 10, 10, generator=draw)
    smooth = F.interpolate(noise, (height, width + 2 * margin), mode="bicubic", align_corners=False)[0, 0]
    tint = torch.rand(3, generator=draw) * 0.06 - 0.03
    ground = GROUND + 0.06 * smooth[..., None] + tint
    start = margin + shift.round().long()
    return (
        torch.stack([ground[:, s : s + width] for s in start.tolist()])
        if shift.any()
        else (ground[:, margin : margin + width].expand(frames, height, width, 3))
    )
