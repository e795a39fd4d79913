"""The oracle reads rendered scenes: what it is right about, and that nothing else fools it."""

import numpy as np
import pytest
from clips import blurred, frozen, noisy, reversed_in_time, shuffled

from sla2 import grammar, scenes
from sla2.render import render
from sla2_eval.metrics.oracle import Oracle
from sla2_eval.video_scores import canonical_masks

SMALL = {"frames": 17, "height": 64, "width": 64, "fps": 8}
LARGE = {"frames": 9, "height": 192, "width": 256, "fps": 4}
JUDGED = ("color", "shape", "direction")
RICH = scenes.SIMPLE | {
    "colors": list(grammar.COLORS),
    "shapes": ["circle", "square", "triangle", "star", "cross"],
    "textures": ["plain", "striped"],
    "directions": list(grammar.DIRECTIONS),
    "backgrounds": list(grammar.BACKGROUNDS),
}
EVERYTHING = RICH | {
    "shapes": list(grammar.SHAPES),
    "textures": list(grammar.TEXTURES),
    "sizes": {"small": 0.2, "medium": 0.3, "large": 0.4},
    "rotation": 0.5,
    "pan": 0.3,
}
TWO = RICH | {"second_shape": 1.0, "sizes": {"small": 0.26, "medium": 0.3}}


@pytest.fixture(scope="module")
def oracle():
    return Oracle(grammar.COLORS, canonical_masks(), grammar.DIRECTIONS)


def rendered(scene: dict, video: dict, count: int):
    """Held-out clips and their words."""
    drawn = [scenes.sample(scene, video, 11, "heldout", index) for index in range(count)]
    return render(drawn, **video).numpy(), [grammar.attributes(one) for one in drawn]


def promised(words: dict) -> dict:
    return {name: words[name] for name in (*JUDGED, "second_color") if name in words}


def means(oracle, clips, words) -> dict[str, float]:
    scores = [oracle(clip, promised(of_clip)) for clip, of_clip in zip(clips, words, strict=True)]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


@pytest.mark.parametrize(
    ("scene", "video", "count"),
    [(scenes.SIMPLE, SMALL, 80), (RICH, SMALL, 40), (RICH, LARGE, 30), (EVERYTHING, LARGE, 20), (TWO, LARGE, 20)],
    ids=["simple", "rich-64", "rich-192x256", "everything", "two shapes"],
)
def test_right_on_held_out_renders(oracle, scene, video, count):
    """Each attribute, and all of them at once, on at least 95 % of clips."""
    clips, words = rendered(scene, video, count)
    for name, mean in means(oracle, clips, words).items():
        assert mean >= 0.95, f"{name}: {mean:.3f}"


def test_each_attribute_is_judged_alone(oracle):
    clips, words = rendered(scenes.SIMPLE, SMALL, 12)
    others = {"color": "purple", "shape": "star", "direction": "up-left"}
    for clip, of_clip in zip(clips, words, strict=True):
        for name, other in others.items():
            scores = oracle(clip, promised(of_clip) | {name: other})
            wrong = {key for key, value in scores.items() if value == 0}
            assert wrong == {f"oracle.{name}", "oracle.all"}


def test_survives_what_a_viewer_would(oracle):
    """Mild noise and blur change no answer: the oracle is about content."""
    clips, words = rendered(scenes.SIMPLE, SMALL, 24)
    for edit in (lambda clip: noisy(clip, 15), lambda clip: blurred(clip, 2)):
        assert means(oracle, map(edit, clips), words)["oracle.all"] >= 0.95


def test_damage_of_motion_costs_direction(oracle):
    clips, words = rendered(scenes.SIMPLE, SMALL, 24)
    for edit, most in ((frozen, 0.0), (reversed_in_time, 0.0), (shuffled, 0.25)):
        found = means(oracle, map(edit, clips), words)
        assert found["oracle.direction"] <= most, edit.__name__
    assert means(oracle, map(frozen, clips), words)["oracle.shape"] >= 0.95


def degenerate(size: tuple[int, int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    flat = {name: np.full((*size, 3), rgb, np.uint8) for name, rgb in (("black", 0), ("grey", 127), ("white", 255))}
    noise = {f"noise {seed}": rng.integers(0, 256, (*size, 3), np.uint8) for seed in range(3)}
    grain = {f"grain {s}": np.clip(rng.normal(84, 15 * s, (*size, 3)), 0, 255).astype(np.uint8) for s in (1, 2, 3)}
    still = {"still noise": frozen(noise["noise 0"]), "red": np.full((*size, 3), (214, 40, 40), np.uint8)}
    return flat | noise | grain | still


@pytest.mark.parametrize("size", [(17, 64, 64), (9, 192, 256)])
def test_blank_and_noise_show_nothing(oracle, size):
    for name, clip in degenerate(size).items():
        scores = oracle(clip, {"color": "red", "shape": "circle", "direction": "still"})
        assert not any(scores.values()), f"{name}: {scores}"


def test_second_shape_is_looked_for_by_colour(oracle):
    """With two promised things the first one is read, also when the other is larger."""
    clips, words = rendered(TWO, LARGE, 6)
    for clip, of_clip in zip(clips, words, strict=True):
        second = {name: of_clip[f"second_{name}"] for name in JUDGED}
        scores = oracle(clip, second | {"second_color": of_clip["color"]})
        assert scores["oracle.color"] == 1
        if second["shape"] != of_clip["shape"]:
            assert oracle(clip, promised(of_clip) | {"shape": second["shape"]})["oracle.shape"] == 0


def test_only_promised_words_are_scored(oracle):
    (clip,), (words,) = rendered(scenes.SIMPLE, SMALL, 1)
    assert set(oracle(clip, {"color": words["color"]})) == {"oracle.presence", "oracle.color", "oracle.all"}
    assert oracle(clip, {}) == {"oracle.presence": 1.0}
    with pytest.raises(ValueError, match="shape 'blob' is not one of circle"):
        oracle(clip, {"shape": "blob"})
