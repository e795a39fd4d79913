"""The words of procedural scenes and the captions made of them.

A caption is a function of the words alone, so that swapping one attribute gives the caption of the swapped scene. Words that
stand for the usual (a plain texture, a medium size, a gray background) are left out. Standard library only, as the Snakefile
checks settings with it.
"""

import math

from sla2.errors import UserError

# Brightness differs as well as hue, so that colours stay apart for a colour-blind reader.
COLORS = {
    "red": (214, 40, 40),
    "green": (62, 180, 74),
    "blue": (52, 92, 232),
    "yellow": (250, 222, 50),
    "orange": (245, 135, 25),
    "purple": (150, 50, 190),
    "cyan": (70, 220, 230),
    "white": (245, 245, 245),
}
BACKGROUNDS = {"gray": (84, 84, 88), "brown": (88, 64, 44), "navy": (34, 44, 84), "teal": (26, 78, 78)}
# Farthest point from the centre of gravity, in radii: what must stay inside the frame even while the shape turns.
SHAPES = {"circle": 1.0, "square": 1.21, "triangle": 1.2, "star": 1.15, "cross": 1.01, "ring": 1.0}
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "medium", "large")
SPEEDS = ("slow", "medium", "fast")
_D = math.sqrt(0.5)
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-right": (_D, -_D),
    "up-left": (-_D, -_D),
    "down-right": (_D, _D),
    "down-left": (-_D, _D),
    "still": (0.0, 0.0),
}
TURNS = {"clockwise": 1, "counterclockwise": -1}
OPPOSITES = {
    name: other
    for words in (DIRECTIONS, {name: (turn, 0) for name, turn in TURNS.items()})
    for name, (x, y) in words.items()
    for other, there in words.items()
    if there == (-x, -y)
}
# What each attribute can be. `second_` before a name of SUBJECT speaks of the second shape.
SUBJECT = {
    "color": list(COLORS),
    "shape": list(SHAPES),
    "texture": list(TEXTURES),
    "size": list(SIZES),
    "direction": list(DIRECTIONS),
    "speed": [*SPEEDS, "none"],  # none: of a shape that stands still
    "bounces": [False, True],
    "rotation": ["none", *TURNS],
}
CHOICES = {
    **SUBJECT,
    **{f"second_{name}": words for name, words in SUBJECT.items()},
    "second_in_front": [False, True],
    "background": list(BACKGROUNDS),
    "pan": ["none", "right", "left", "up", "down"],
}
USUAL = {
    "texture": "plain",
    "size": "medium",
    "direction": "still",
    "speed": "medium",
    "bounces": False,
    "rotation": "none",
}


def caption(words: dict) -> str:
    """The sentence for a flat dict of words, as `attributes` returns it; a missing word is the usual one.

    Raises:
        UserError: for an attribute or a word that the grammar does not know, or without `color` and `shape`.
    """
    for name, word in words.items():
        if name not in CHOICES:
            raise UserError(f"attribute '{name}' is not one of {', '.join(CHOICES)}")
        if word not in CHOICES[name]:
            raise UserError(f"attribute {name} '{word}' is not one of {', '.join(map(str, CHOICES[name]))}")
    second = {name.removeprefix("second_"): word for name, word in words.items() if name.startswith("second_")}
    in_front = second.pop("in_front", False)
    for prefix, subject in (("", words), ("second_", second)):
        missing = [prefix + name for name in ("color", "shape") if name not in subject]
        if missing and (subject or not prefix):
            raise UserError(f"attributes {words}: {' and '.join(missing)} is missing; a caption names both")
    parts = [_clause(words)]
    if second:
        parts.append(_clause(second) + (" in front of it" if in_front else ""))
    if words.get("background", "gray") != "gray":
        parts.append(f"the background is {words['background']}")
    if words.get("pan", "none") != "none":
        parts.append(f"the camera pans {words['pan']}")
    return ", ".join(parts)


def played_backwards(words: dict) -> dict | None:
    """Words of the same clip with its frames in reverse order; None where they cannot be told from the words.

    What bounces names the direction that it started in, which is not the opposite of the one that it ends in.
    """
    if words.get("bounces") or words.get("second_bounces"):
        return None
    return {
        name: OPPOSITES.get(word, word) if name.endswith(("direction", "rotation", "pan")) else word
        for name, word in words.items()
    }


def _clause(words: dict) -> str:
    words = USUAL | words
    said = [words[name] for name in ("size", "texture") if words[name] != USUAL[name]]
    said += [words["color"], words["shape"]]
    text = f"{'an' if said[0][0] in 'aeiou' else 'a'} {' '.join(said)} "
    if words["direction"] == "still":
        text += "stands still"
    else:
        manner = {"slow": " slowly", "fast": " fast"}.get(words["speed"], "")
        text += f"moves {words['direction'].replace('-', ' ')}{manner}"
    text += " and bounces" if words["bounces"] else ""
    return text + (f" and turns {words['rotation']}" if words["rotation"] != "none" else "")


def vocabulary() -> list[str]:
    """Every word, and the comma, that a caption can hold."""
    fixed = [
        "a",
        "an",
        ",",
        "stands",
        "still",
        "moves",
        "slowly",
        "fast",
        "and",
        "bounces",
        "turns",
        "in",
        "front",
        "of",
        "it",
        "the",
        "background",
        "is",
        "camera",
        "pans",
    ]
    listed = [*COLORS, *SHAPES, *TEXTURES[1:], "small", "large", *TURNS, *list(BACKGROUNDS)[1:]]
    return list(dict.fromkeys(fixed + listed + ["right", "left", "up", "down"]))


def attributes(scene: dict) -> dict:
    """All words of a scene, flat; the second shape's carry the prefix `second_`."""
    words: dict = {}
    for prefix, shape in zip(("", "second_"), scene["shapes"], strict=False):
        words |= {prefix + name: shape[name] for name in SUBJECT}
    if len(scene["shapes"]) > 1:
        words["second_in_front"] = scene["second_in_front"]
    return words | {"background": scene["background"]["color"], "pan": scene["pan"]["direction"]}
