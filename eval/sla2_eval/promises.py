"""What a prompt promises of its video: its attributes and, where it is the grammar's own sentence, what that leaves unsaid."""

from sla2 import grammar
from sla2.errors import UserError
from sla2.prompts import Prompt

NAMED = ("color", "shape", "direction", "speed", "second_color", "bounces")
MOTION = {"direction": "still", "rotation": "none"}  # of each thing, in the words of rest


def is_sentence(prompt: Prompt) -> bool:
    """Whether the text is the grammar's caption for the attributes, so that a word left out is the usual one."""
    try:
        return grammar.caption(prompt.attributes) == prompt.text
    except UserError:
        return False


def promised(prompt: Prompt) -> dict[str, str | int | bool]:
    """What the frames can be asked for: colour, shape, direction, speed, number of things and static, as far as promised.

    `second_color` and `bounces` tell the oracle how to look. `static` is there, and true, where nothing moves, turns or pans.
    """
    words, sentence = prompt.attributes, is_sentence(prompt)
    if sentence:
        words = grammar.USUAL | words
        if words["direction"] == "still":
            words |= {"speed": "none"}
    found = {name: words[name] for name in NAMED if name in words}
    if sentence:
        found["count"] = 2 if "second_color" in words else 1
    if _is_static(words):
        found["static"] = True
    return found


def _is_static(words: dict) -> bool:
    """Whether every thing is said to rest, and the camera too; who writes attributes of his own says so by `direction`."""
    things = ("", "second_") if "second_color" in words else ("",)
    rests = all(words.get(thing + name, MOTION[name]) == MOTION[name] for thing in things for name in MOTION)
    return "direction" in words and rests and words.get("pan", "none") == "none"
