"""Procedural scenes: words, captions, parameters and pixels agree."""

import json

import pytest
import torch

from sla2 import grammar, scenes
from sla2.errors import UserError
from sla2.render import masks, render, tracks

VIDEO = {"frames": 9, "height": 64, "width": 80, "fps": 8}
RICH = scenes.SIMPLE | {
    "colors": list(grammar.COLORS),
    "shapes": list(grammar.SHAPES),
    "textures": list(grammar.TEXTURES),
    "sizes": {"small": 0.25, "medium": 0.35, "large": 0.5},
    "speeds": {"slow": 0.2, "medium": 0.4, "fast": 1.0},
    "directions": list(grammar.DIRECTIONS),
    "backgrounds": list(grammar.BACKGROUNDS),
    "second_shape": 0.5,
    "occlusion": 0.5,
    "rotation": 0.5,
    "bounce": 0.3,
    "pan": 0.5,
}


def drawn(count: int, scene: dict = RICH, split: str = "train") -> list[dict]:
    return [scenes.sample(scene, VIDEO, 0, split, index) for index in range(count)]


def only(**changes) -> dict:
    return scenes.SIMPLE | {"grain": 0.0, "contrast": 0.0, "jitter": 0.0} | changes


def test_a_scene_is_a_function_of_seed_split_and_index():
    assert drawn(5) == drawn(5)
    keys = [(seed, split, index) for seed in (0, 1) for split in ("train", "heldout", "judge") for index in (3, 4)]
    assert len({json.dumps(scenes.sample(RICH, VIDEO, *key)) for key in keys}) == len(keys)


def test_a_scene_does_not_change_between_releases():
    """The draws are hashes: this one would change only with the code, and every published study with it."""
    scene = scenes.sample(scenes.SIMPLE, VIDEO, 0, "train", 0)
    assert grammar.caption(grammar.attributes(scene)) == "a red triangle moves down"
    assert scene["shapes"][0]["position"] == [0.68679, 0.30354]


def test_words_are_drawn_evenly():
    words = [grammar.attributes(scene)["color"] for scene in drawn(800, scenes.SIMPLE)]
    counts = [words.count(word) for word in scenes.SIMPLE["colors"]]
    assert sum(counts) == 800
    assert min(counts) > 150


def test_batch_equals_single_clips():
    chosen = drawn(12)
    together = render(chosen, **VIDEO)
    assert together.shape == (12, 9, 64, 80, 3)
    for scene, clip in zip(chosen, together, strict=True):
        assert torch.equal(render([scene], **VIDEO)[0], clip)


def test_a_scene_does_not_depend_on_resolution():
    chosen = drawn(6, RICH | {"grain": 0.0})
    double = VIDEO | {"height": 128, "width": 160}
    large = render(chosen, **double).float()
    small = torch.nn.functional.avg_pool2d(large.permute(0, 1, 4, 2, 3).flatten(0, 1), 2)
    small = small.unflatten(0, (6, 9)).permute(0, 1, 3, 4, 2)
    assert (small - render(chosen, **VIDEO).float()).abs().mean() < 1.5


@pytest.mark.parametrize("direction", list(grammar.DIRECTIONS))
def test_shapes_move_as_the_caption_says(direction):
    chosen = drawn(4, only(directions=[direction]))
    for scene, cover, track in zip(chosen, masks(chosen, **VIDEO), tracks(chosen, **VIDEO), strict=True):
        said = grammar.caption(grammar.attributes(scene))
        assert ("stands still" if direction == "still" else f"moves {direction.replace('-', ' ')}") in said
        moved = (track[0, -1] - track[0, 0]) / 64
        wanted = torch.tensor(grammar.DIRECTIONS[direction], dtype=torch.float64) * 0.45
        torch.testing.assert_close(moved, wanted, atol=1e-3, rtol=0)
        rows, columns = torch.arange(64.0), torch.arange(80.0)
        area = cover[0].sum((1, 2))
        seen = torch.stack([(cover[0].sum(1) * columns).sum(1), (cover[0].sum(2) * rows).sum(1)], -1) / area[:, None]
        torch.testing.assert_close(seen.double(), track[0], atol=0.3, rtol=0)


def test_shapes_stay_in_the_frame():
    cover = masks(drawn(60), **VIDEO)
    assert cover[..., 0, :].max() < 1
    borders = (cover[..., 0, :], cover[..., -1, :], cover[..., :, 0], cover[..., :, -1])
    assert max(border.mean() for border in borders) < 0.02


def test_bouncing_shapes_come_back():
    for scene in drawn(20, only(bounce=1.0)):
        shape = scene["shapes"][0]
        path = tracks([scene], **VIDEO)[0, 0]
        steps = (path[1:] - path[:-1]) @ torch.tensor(grammar.DIRECTIONS[shape["direction"]], dtype=torch.float64)
        assert shape["bounces"]
        assert steps[0] > 0 > steps[-1]


def test_second_shape_has_another_color_and_hides_the_first():
    chosen = drawn(200, RICH | {"second_shape": 1.0, "occlusion": 1.0})
    assert all(scene["shapes"][0]["color"] != scene["shapes"][1]["color"] for scene in chosen)
    front = [scene for scene in chosen if scene["second_in_front"]]
    assert len(front) > 100
    middle = VIDEO["frames"] // 2
    alone = masks([scene | {"shapes": scene["shapes"][:1]} for scene in front], **VIDEO)[:, 0, middle]
    both = masks(front, **VIDEO)[:, 0, middle]
    hidden = 1 - both.sum((1, 2)) / alone.sum((1, 2))
    assert hidden.median() > 0.1


def test_camera_pans_over_the_background():
    scene = drawn(1, only(contrast=0.4, pan=1.0, directions=["still"]))[0]
    frames = render([scene], **VIDEO)[0].float().mean(-1)
    still = render([scene | {"pan": {"direction": "none", "velocity": [0, 0]}}], **VIDEO)[0].float().mean(-1)
    corner = (slice(None), slice(0, 8), slice(0, 8))
    assert (still[corner][0] - still[corner][-1]).abs().max() == 0
    assert (frames[corner][0] - frames[corner][-1]).abs().mean() > 1
    assert not scenes.is_static(scene)


def test_grain_is_new_in_every_frame_and_as_strong_as_asked():
    scene = drawn(1, only(grain=4.0, directions=["still"]))[0]
    frames = render([scene], **VIDEO)[0, ..., 0].float()
    assert 3.6 < frames[:, :8, :8].std() < 4.4
    assert (frames[0] - frames[1]).abs().mean() > 2


def test_colors_are_those_of_the_words():
    for scene in drawn(20, only(colors=list(grammar.COLORS))):
        clip = render([scene], **VIDEO)[0, 4]
        inside = masks([scene], **VIDEO)[0, 0, 4] == 1
        assert clip[inside].float().mean(0).tolist() == pytest.approx(
            grammar.COLORS[scene["shapes"][0]["color"]], abs=1
        )


def test_captions_use_the_vocabulary_and_name_what_is_unusual():
    known = set(grammar.vocabulary())
    for scene in drawn(200):
        text = grammar.caption(grammar.attributes(scene))
        assert set(text.replace(",", " ,").split()) <= known
        assert scene["shapes"][0]["color"] in text


def test_a_clip_played_backwards_has_a_caption_of_its_own():
    words = {"color": "red", "shape": "circle", "direction": "up-right", "rotation": "clockwise", "pan": "left"}
    words |= {"second_color": "blue", "second_shape": "star", "second_direction": "still"}
    turned = grammar.played_backwards(words)
    assert turned == words | {"direction": "down-left", "rotation": "counterclockwise", "pan": "right"}
    assert grammar.played_backwards(turned) == words
    assert grammar.played_backwards(words | {"second_bounces": True}) is None, "it ends in another direction"


def test_swapping_a_word_changes_only_that_word():
    words = {"color": "red", "shape": "circle", "direction": "right"}
    assert grammar.caption(words) == "a red circle moves right"
    assert grammar.caption({**words, "color": "orange"}) == "an orange circle moves right"
    assert grammar.caption({**words, "direction": "still"}) == "a red circle stands still"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"color": "red"}, "shape is missing"),
        ({"color": "pink", "shape": "circle"}, "color 'pink' is not one of red"),
        ({"color": "red", "shape": "circle", "mood": "happy"}, "'mood' is not one of color"),
    ],
)
def test_words_that_make_no_sentence(words, message):
    with pytest.raises(UserError, match=message):
        grammar.caption(words)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"sizes": {"large": 0.6}}, "speeds"), ({"second_shape": 0.5, "colors": ["red"]}, "colors")],
)
def test_scenes_that_cannot_be_drawn(changes, key):
    assert [name for name, _ in scenes.check(scenes.SIMPLE | changes)] == [key]
    assert not list(scenes.check(scenes.SIMPLE))
