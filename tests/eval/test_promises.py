"""What prompts promise: named words, and for the grammar's own sentences also what they leave unsaid."""

import pytest

from sla2 import grammar, scenes
from sla2.prompts import Prompt
from sla2_eval.promises import is_sentence, promised

VIDEO = {"frames": 9, "height": 32, "width": 32, "fps": 8}
RED = {"color": "red", "shape": "circle"}


def of(words: dict, text: str | None = None) -> dict:
    return promised(Prompt("p", grammar.caption(words) if text is None else text, words))


def test_a_sentence_promises_the_usual_where_it_is_silent():
    assert of(RED | {"direction": "up"}) == RED | {"direction": "up", "speed": "medium", "bounces": False, "count": 1}
    assert of(RED | {"direction": "up", "speed": "slow"})["speed"] == "slow"
    two = of(RED | {"second_color": "blue", "second_shape": "star"})
    assert (two["count"], two["second_color"]) == (2, "blue")


def test_free_text_promises_what_its_attributes_name():
    assert of({"color": "red"}, "a red bus") == {"color": "red"}
    assert of({"mood": "calm"}, "a calm sea") == of({}, "a cat") == {}
    assert not is_sentence(Prompt("p", "a red circle", RED | {"mood": "calm"}))


@pytest.mark.parametrize(
    "moves", [{"direction": "up"}, {"rotation": "clockwise"}, {"pan": "left"}, {"second_direction": "up"}]
)
def test_static_where_all_rests(moves):
    words = RED | {"second_color": "blue", "second_shape": "star"}
    rest = of(words)
    assert (rest["direction"], rest["speed"], rest["static"]) == ("still", "none", True)
    assert "static" not in of(words | moves)


def test_free_text_is_static_when_it_says_so():
    assert of({"direction": "still"}, "a vase on a table")["static"]
    assert "static" not in of({"direction": "still", "pan": "left"}, "a vase")
    assert "static" not in of({"color": "red"}, "a red vase")


def test_agrees_with_the_scenes_themselves():
    everything = scenes.SIMPLE | {"directions": ["up", "still"], "rotation": 0.3, "pan": 0.3, "second_shape": 0.5}
    static = 0
    for index in range(80):
        scene = scenes.sample(everything, VIDEO, 0, "heldout", index)
        found = of(grammar.attributes(scene))
        assert found.get("static", False) == scenes.is_static(scene)
        assert found["count"] == len(scene["shapes"])
        static += found.get("static", False)
    assert 5 < static < 75
