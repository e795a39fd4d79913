"""What text alignment, forced choices and frame consistency see, by a judge that is trained here, in some twenty seconds, to pass its gates.

Clips are 48 px and the judge sees frames of 24, so blur of one pixel is nothing to it: strengths are twice those of a judge that sees
all pixels.
"""

import numpy as np
import pytest
import torch
from clips import assert_order, blurred, frozen, noisy, reversed_in_time, shuffled, to_uint8
from conftest import JUDGE

from sla2 import grammar
from sla2.data import Clips, procedural, write_index
from sla2_eval.judge import learn
from sla2_eval.metrics.frames import UndefinedError
from sla2_eval.metrics.guards import guards
from sla2_eval.metrics.text_alignment import StoryboardClip
from sla2_eval.trained_judge import load_judge, swapped

VIDEO = {"frames": 17, "height": 48, "width": 48, "fps": 8}
SCENE = {"spread": 0.1, "shapes": ["circle", "triangle"]}
LEARNT = JUDGE | {
    "video": VIDEO,
    "steps": 600,
    "batch": 32,
    "learning_rate": 1.5e-3,
    "frame_size": 24,
    "width": 64,
    "layers": 2,
    "heads": 4,
    "gate_clips": 120,
    "naturalness_patch": 16,
}
COUNT = 24


class Judged:
    """Clips that the judge never saw, with their words and captions."""

    def __init__(self, judge: StoryboardClip, gates: dict, clips: Clips) -> None:
        self.judge, self.gates = judge, gates
        self.clips = [clips[index].frames.numpy() for index in range(COUNT)]
        self.words = [grammar.attributes(scene) for scene in clips.scenes[:COUNT]]
        self.captions = [grammar.caption(words) for words in self.words]
        self.clean = self.alignment(lambda video: video)

    def alignment(self, edit) -> list[float]:
        """Of edited clips to their own captions."""
        return [
            self.judge.text_alignment(edit(clip), text) for clip, text in zip(self.clips, self.captions, strict=True)
        ]

    def consistency(self, edit) -> list[float]:
        """Of edited clips; `edit` takes a clip and another one."""
        others = [*self.clips[1:], self.clips[0]]
        return [self.judge.frame_consistency(edit(clip, other)) for clip, other in zip(self.clips, others, strict=True)]


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Judged:
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("judge")
    count = {"train": 1, "heldout": 8, "judge": 384, "judge_heldout": 120}
    for split, entries in procedural({"scene": SCENE, "video": VIDEO, "seed": 0, "clips": count}).items():
        write_index(data / f"{split}.jsonl", entries)
    learn(LEARNT, data, torch.device("cpu"), folder)
    judge, gates = load_judge(folder, torch.device("cpu"))
    return Judged(judge, gates, Clips(data / "judge_heldout.jsonl", VIDEO))


def test_true_caption_beats_each_exchange_of_an_attribute(judged) -> None:
    """At the gate's share on all held-out clips, and on each clip here by the caption's mean cosine."""
    assert set(judged.gates["attributes"]) == {"color", "shape", "direction"}
    for name, found in judged.gates["attributes"].items():
        assert found["accuracy"] >= 0.95, name
        wrong = [swapped(words, name, judged.gates["choices"][name]) for words in judged.words]
        best = [max(judged.judge.text_alignment(clip, text) for text in texts) for clip, texts in zip(judged.clips, wrong, strict=True)]  # fmt: skip
        assert_order(best, judged.clean)


def test_captions_of_other_videos_fit_far_less(judged) -> None:
    moved = [*judged.captions[5:], *judged.captions[:5]]
    random = [judged.judge.text_alignment(clip, text) for clip, text in zip(judged.clips, moved, strict=True)]
    assert_order(random, judged.clean)
    assert np.mean(judged.clean) > np.mean(random) + 0.5


def test_retrieval_finds_the_caption_and_not_another(judged) -> None:
    texts = sorted(set(judged.captions))

    def recall(captions: list[str]) -> float:
        found = []
        for clip, text in zip(judged.clips, captions, strict=True):
            others = judged.judge.embed_texts([other for other in texts if other != text])
            found.append(judged.judge.retrieval(clip, text, others))
        return float(np.mean(found))

    assert recall(judged.captions) >= 0.9
    elsewhere = [next(other for other in texts if other != text) for text in judged.captions]
    assert recall(elsewhere) <= 0.1


def test_alignment_falls_with_noise_and_blur(judged) -> None:
    for edit, strengths in ((noisy, (0.4 * 255, 0.15 * 255)), (blurred, (8, 4))):
        assert_order(*(judged.alignment(lambda video, e=edit, s=s: e(video, s)) for s in strengths))
    mild = judged.alignment(lambda video: noisy(video, 0.05 * 255))
    assert_order(judged.alignment(lambda video: noisy(video, 0.4 * 255)), mild)
    assert np.mean(mild) == pytest.approx(np.mean(judged.clean), abs=0.02), "noise that a viewer hardly sees"


def test_a_grey_video_is_lowest(judged) -> None:
    grey = judged.alignment(lambda video: np.full_like(video, 90))
    for edit in (
        frozen,
        reversed_in_time,
        shuffled,
        lambda video: noisy(video, 0.4 * 255),
        lambda video: blurred(video, 8),
    ):
        assert np.mean(judged.alignment(edit)) > np.mean(grey) + 0.2


def test_motion_is_seen(judged) -> None:
    for edit in (frozen, shuffled, reversed_in_time):
        assert_order(judged.alignment(edit), judged.clean)


def test_exchanged_colours_are_seen(judged) -> None:
    assert_order(judged.alignment(lambda video: video[..., ::-1].copy()), judged.clean)


def test_a_reversed_clip_prefers_the_opposite_direction(judged) -> None:
    right = []
    for clip, words, text in zip(judged.clips, judged.words, judged.captions, strict=True):
        opposite = grammar.caption(words | {"direction": grammar.OPPOSITES[words["direction"]]})
        right.append(judged.judge.forced_choice(reversed_in_time(clip), opposite, [text]))
    assert np.mean(right) >= 0.95


def test_repeated_evaluation_is_bit_equal_by_array_and_by_tensor(judged) -> None:
    assert judged.alignment(torch.from_numpy) == judged.clean
    assert judged.alignment(lambda video: video / 255.0) == judged.clean
    clip = judged.clips[0]
    assert judged.judge.frame_consistency(torch.from_numpy(clip)) == judged.judge.frame_consistency(clip)


def drifting(video: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Red turns to blue over the clip."""
    share = np.linspace(0, 1, len(video))[:, None, None, None]
    return to_uint8(video * (1 + share * np.array([-0.6, 0.2, 0.6])))


def half_swapped(video: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([video[: len(video) // 2], other[len(video) // 2 :]])


def alternating(video: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.stack([(other if t % 2 else video)[t] for t in range(len(video))])


def test_consistency_falls_from_clean_to_alternation(judged) -> None:
    clean = judged.consistency(lambda video, other: video)
    drift, half = judged.consistency(drifting), judged.consistency(half_swapped)
    assert_order(judged.consistency(alternating), half, clean)
    assert_order(drift, clean)
    assert np.mean(half) < np.mean(drift)


def test_consistency_falls_with_noise(judged) -> None:
    clean = judged.consistency(lambda video, other: video)
    noise = [judged.consistency(lambda video, other, s=s: noisy(video, s)) for s in (40, 15)]
    assert_order(noise[0], noise[1])
    assert_order(noise[0], clean)


def test_consistency_of_sameness_is_one_and_flagged(judged) -> None:
    assert judged.consistency(lambda video, other: frozen(video)) == pytest.approx([1.0] * COUNT, abs=1e-5)
    blank = np.full_like(judged.clips[0], 90)
    assert judged.judge.frame_consistency(blank) == pytest.approx(1, abs=1e-5)
    assert guards(frozen(judged.clips[0]), None)["guard.static"] == 1
    assert guards(blank, None)["guard.blank"] == 1
    with pytest.raises(UndefinedError, match="two frames"):
        judged.judge.frame_consistency(blank[:1])


def test_reversal_changes_only_the_term_of_the_first_frame(judged) -> None:
    for clip in judged.clips[:6]:
        features = judged.judge.frame_features(clip)
        neighbours = (features[1:] * features[:-1]).sum(-1).clamp_min(0).mean()
        to_first = (features[1:] @ features[0]).clamp_min(0).mean()
        to_last = (features[:-1] @ features[-1]).clamp_min(0).mean()
        assert judged.judge.frame_consistency(clip) == pytest.approx(float(neighbours + to_first) / 2, abs=1e-5)
        backwards = judged.judge.frame_consistency(reversed_in_time(clip))
        assert backwards == pytest.approx(float(neighbours + to_last) / 2, abs=1e-5)
