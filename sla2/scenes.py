"""The grammar of procedural scenes: words, their distribution, captions, and the scene parameters behind each clip.

A scene is a JSON-able dict of words (`color`, `direction`, ...) and of the numbers that the renderer needs. Lengths are in short
sides of the frame, x to the right and y down, times in seconds, so that a scene does not change with resolution or frame rate.
Every number is drawn by hashing (seed, split, index, name), which gives the same scene on every machine and with every library.
Velocities are those seen in the frame: a camera that pans follows its subject, and only the background passes by.
Standard library only, as the Snakefile checks settings with it.
"""

import hashlib
import math
from collections.abc import Iterator

from sla2.grammar import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, TURNS

# What a scene may contain; the keys of config `data.scene` replace entries, and its schema says what each one means.
SIMPLE = {
    "colors": ["red", "green", "blue", "yellow"],
    "shapes": ["circle", "square", "triangle"],
    "textures": ["plain"],
    "sizes": {"medium": 0.36},
    "directions": ["right", "left", "up", "down"],
    "speeds": {"medium": 0.45},
    "backgrounds": ["gray"],
    "contrast": 0.25,
    "grain": 2.0,
    "jitter": 0.05,
    "spread": 0.3,
    "second_shape": 0.0,
    "occlusion": 0.0,
    "rotation": 0.0,
    "turn": 0.5,
    "bounce": 0.0,
    "pan": 0.0,
    "pan_speed": 0.4,
}


def is_static(scene: dict) -> bool:
    """Whether nothing in the scene moves, turns or pans."""
    resting = all(s["direction"] == "still" and s["rotation"] == "none" for s in scene["shapes"])
    return resting and scene["pan"]["direction"] == "none"


def position(shape: dict, seconds: float, extent: tuple[float, float]) -> tuple[float, float]:
    """Centre of a shape, reflected at the borders of a frame of `extent` (width, height) short sides."""
    reach = SHAPES[shape["shape"]] * shape["radius"]
    centre = []
    for start, velocity, side in zip(shape["position"], shape["velocity"], extent, strict=True):
        span = side - 2 * reach
        centre.append(reach + span - abs((start - reach + velocity * seconds) % (2 * span) - span))
    return centre[0], centre[1]


class Draw:
    """Uniform numbers in [0, 1), each a function of its key and name alone, so that a new name changes no other draw."""

    def __init__(self, *key: object) -> None:
        self.key = "/".join(map(str, key))

    def __call__(self, name: str) -> float:
        return self.integer(name, 53) / 2**53

    def integer(self, name: str, bits: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.key}/{name}".encode()).digest()[:8]) >> (64 - bits)

    def choice(self, name: str, options: list):
        return options[int(self(name) * len(options))]

    def between(self, name: str, low: float, high: float) -> float:
        return low + (high - low) * self(name)


def sample(scene: dict, video: dict, seed: int, split: str, index: int) -> dict:
    """One scene of a distribution.

    Args:
        scene: settings as `SIMPLE`.
        video: frames, height, width, fps of the clip that it will be rendered as.
        seed, split, index: the clip; splits share no random numbers.
    """
    draw = Draw(seed, split, index)
    stage = _Stage(scene, video)
    tint = BACKGROUNDS[color := draw.choice("background", scene["backgrounds"])]
    background = {"color": color, "rgb": _jittered(tint, scene["jitter"], draw("tint")), "contrast": scene["contrast"]}
    background |= {"grain": scene["grain"], "seed": draw.integer("texture", 31)}
    pan = draw.choice("pan direction", ["right", "left", "up", "down"]) if draw("pan") < scene["pan"] else "none"
    toward = DIRECTIONS["still" if pan == "none" else pan]
    velocity = [round(scene["pan_speed"] / stage.duration * axis, 5) for axis in toward]

    first = stage.place(stage.shape(draw, "first", None), draw, "first")
    shapes, in_front = [first], False
    if draw("second") < scene["second_shape"]:
        second = stage.shape(draw, "second", first["color"])
        # Of some places, the one with most room; or, to pass in front, the one that half covers the first shape in mid clip.
        meet = draw("occlusion") < scene["occlusion"]
        half = 0.5 * (first["radius"] + second["radius"])
        places = [stage.place(second, draw, f"second {attempt}") for attempt in range(24)]
        distances = [stage.distance(first, place, meet) for place in places]
        costs = [abs(distance - half) if meet else -distance for distance in distances]
        shapes.append(places[costs.index(min(costs))])
        in_front = stage.distance(*shapes, False) < 1.6 * half
    camera = {"direction": pan, "velocity": velocity}
    return {"shapes": shapes, "second_in_front": in_front, "background": background, "pan": camera}


class _Stage:
    """The frame and the clip's duration, in which shapes are drawn and placed."""

    def __init__(self, scene: dict, video: dict) -> None:
        short = min(video["height"], video["width"])
        self.scene, self.extent = scene, (video["width"] / short, video["height"] / short)
        self.duration = (video["frames"] - 1) / video["fps"]

    def shape(self, draw: Draw, which: str, taken: str | None) -> dict:
        """Words and size of a shape, and how it moves; `place` says from where. `taken` is a colour that it must not have."""
        scene = self.scene

        def pick(name: str) -> str:
            return draw.choice(f"{which} {name}", [word for word in scene[name] if word != taken])

        words = {"color": pick("colors"), "shape": pick("shapes"), "texture": pick("textures"), "size": pick("sizes")}
        words |= {"direction": pick("directions"), "speed": pick("speeds"), "rotation": "none"}
        round_and_plain = words["shape"] in ("circle", "ring") and words["texture"] == "plain"
        if draw(f"{which} rotation") < scene["rotation"] and not round_and_plain:
            words["rotation"] = draw.choice(f"{which} turn", list(TURNS))
        if words["direction"] == "still":
            words["speed"] = "none"
        spread = {
            name: 1 + scene["jitter"] * draw.between(f"{which} {name} jitter", -1, 1) for name in ("size", "speed")
        }
        speed = scene["speeds"].get(words["speed"], 0.0) * spread["speed"] / self.duration
        turning = words["rotation"] != "none"
        return words | {
            "rgb": _jittered(COLORS[words["color"]], scene["jitter"], draw(f"{which} light")),
            "radius": round(scene["sizes"][words["size"]] / 2 * spread["size"], 5),
            "velocity": [round(speed * axis, 5) for axis in DIRECTIONS[words["direction"]]],
            "angle": round(draw(f"{which} angle"), 5) if turning else 0.0,
            "turn": round(TURNS[words["rotation"]] * scene["turn"] / self.duration, 5) if turning else 0.0,
        }

    def place(self, shape: dict, draw: Draw, which: str) -> dict:
        """The shape with a start: inside the frame all along, or with one axis set so that it meets a border in mid clip."""
        reach = SHAPES[shape["shape"]] * shape["radius"]
        moving = [axis for axis in (0, 1) if shape["velocity"][axis]]
        hits = moving and draw(f"{which} bounce") < self.scene["bounce"]
        hit = draw.choice(f"{which} axis", moving) if hits else None
        start, bounces = [], False
        for axis, side in enumerate(self.extent):
            low, high, travel = reach, side - reach, shape["velocity"][axis] * self.duration
            u = draw(f"{which} position {axis}")
            if axis == hit:
                bounces = True
                at = (high if travel > 0 else low) - travel * (0.3 + 0.4 * u)
            else:  # the path's middle, at most half a spread off the frame's
                spread = min(self.scene["spread"], high - low - abs(travel))
                at = side / 2 + (u - 0.5) * spread - travel / 2
            start.append(round(min(high, max(low, at)), 5))
        return shape | {"position": start, "bounces": bounces}

    def distance(self, first: dict, second: dict, middle: bool) -> float:
        """Distance of two centres: in mid clip, or the least over the clip."""
        moments = [0.5] if middle else [step / 16 for step in range(17)]
        at = [[position(shape, m * self.duration, self.extent) for shape in (first, second)] for m in moments]
        return min(math.dist(*pair) for pair in at)


def _jittered(rgb: tuple[int, int, int], jitter: float, u: float) -> list[int]:
    return [min(255, round(channel * (1 + jitter * (2 * u - 1)))) for channel in rgb]


def check(scene: dict) -> Iterator[tuple[str, str]]:
    """What cannot be drawn, as pairs of key and message; ranges of single numbers and words are the schema's.

    Args:
        scene: settings as `SIMPLE`.
    """
    if scene["second_shape"] and len(scene["colors"]) < 2:
        yield (
            "colors",
            f"{scene['colors']} leaves no other colour for a second shape; name two, or set second_shape to 0",
        )
    if not scene["bounce"] and any(word != "still" for word in scene["directions"]):
        reach = max(SHAPES[name] for name in scene["shapes"]) * (1 + scene["jitter"])
        room = 1 - reach * max(scene["sizes"].values())
        way = max(scene["speeds"].values()) * (1 + scene["jitter"])
        if way > room:
            remedy = "choose smaller sizes or speeds, or let shapes bounce"
            yield "speeds", f"{way:.2f} short sides are longer than the {room:.2f} that the largest shape has; {remedy}"
