"""All metrics of one video: each name of the catalogue is a value or a row with its exact reason."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import JUDGE, VIDEO

from sla2 import grammar
from sla2.data import Clips
from sla2.prompts import Prompt
from sla2_eval.metrics.catalogue import METRICS
from sla2_eval.official import FILES, NEEDS, NO_COMMAND
from sla2_eval.video_scores import FIDELITY, NO_JUDGE, NO_SPEEDS, VideoScores, canonical_masks

CPU = torch.device("cpu")
SETS = {"proxy.kid_indomain"}  # of several videos together
OF_VIDEOS = {
    name
    for name in METRICS
    if not name.startswith(("attention.", "sparsity.", "floor.", "proxy.kid", "vbench_official."))
}
JUDGED = ("color", "shape", "direction")
OFFICIAL = {*NEEDS, "vision_reward"}
RETRIEVAL, STATIC = "proxy.retrieval_r1_clip_indomain", "temporal_flickering_static"
INDOMAIN = ("proxy.text_alignment_clip_indomain", RETRIEVAL, "proxy.frame_consistency_clip_indomain")
OTHER = Prompt("q", "a red square moves up", {"color": "red", "shape": "square", "direction": "up"})


@pytest.fixture(scope="module")
def passing(judge_folder, tmp_path_factory):
    """The same judge with a gate that everything passes."""
    folder = tmp_path_factory.mktemp("passing") / "judge"
    shutil.copytree(judge_folder, folder)
    gates = json.loads((folder / "gates.json").read_text())
    (folder / "gates.json").write_text(json.dumps(gates | {"gate": 0.0}))
    return folder


@pytest.fixture(scope="module")
def clip(judge_data):
    """A held-out clip with its prompt, and another clip as the dense model's."""
    clips = Clips(judge_data / "heldout.jsonl", VIDEO)
    words = {name: grammar.attributes(clips.scenes[0])[name] for name in JUDGED}
    return clips[0].frames, Prompt("p", grammar.caption(words), words), clips[1].frames


def scores(folder, prompts) -> VideoScores:
    return VideoScores(VIDEO, folder, prompts, CPU)


def measured(found: VideoScores, *clip) -> dict:
    rows = list(found.of(*clip, VIDEO["fps"], Path("clip.mkv")))
    assert len({row.metric for row in rows}) == len(rows), "a metric stands twice"
    assert not {row.metric for row in rows} & set(found.absent())
    for row in rows:
        assert (row.value is None) == bool(row.reason), row
        assert row.backend, row
    return {row.metric: row for row in rows}


def test_every_metric_has_a_value_where_all_gates_pass(passing, clip):
    found = scores(passing, [clip[1], OTHER])
    rows = measured(found, *clip)
    assert set(rows) == OF_VIDEOS - OFFICIAL - {STATIC}
    assert not [row for row in rows.values() if row.value is None]
    assert set(found.absent()) == OFFICIAL | {STATIC}
    assert found.absent()[STATIC] == "no prompt promises a static scene"
    for name in ("presence", *JUDGED, "all", "speed", "count"):
        assert rows[f"oracle.{name}"].value == 1
    assert rows["oracle.count_error"].value == 0
    assert 0 <= rows["oracle.velocity_error"].value < 0.2


def test_a_failed_gate_is_a_reason(judge_folder, clip):
    found = scores(judge_folder, [clip[1]])
    gates = found.gates["attributes"]
    failed = [name for name in JUDGED if gates[name]["accuracy"] < JUDGE["gate"]]
    assert failed, "three steps of training cannot pass"
    reasons = {
        n: f"gate: forced-choice accuracy of {n} is {gates[n]['accuracy']:.3f}, below {JUDGE['gate']}" for n in failed
    }
    absent = found.absent()
    assert {name: absent[f"judge.{name}"] for name in failed} == reasons
    assert {absent[name] for name in INDOMAIN} == {reasons[failed[0]]}
    assert set(measured(found, *clip)) | set(absent) == OF_VIDEOS | SETS
    assert absent["proxy.kid_indomain"] == reasons[failed[0]]


def test_official_metrics_name_the_file_to_fetch(passing, clip):
    absent = scores(passing, [clip[1]]).absent()
    assert absent["vision_reward"] == NO_COMMAND
    for name, keys in NEEDS.items():
        assert absent[name].startswith("not available: needs the weights ")
        for key in keys:
            assert f"{FILES[key]} (as `{key}`)" in absent[name]


def test_only_what_is_wanted_is_measured(passing, clip):
    wanted = {"temporal_flickering", "proxy.interp_gain", "vbench.aesthetic_quality"}
    found = VideoScores(VIDEO, passing, [clip[1]], CPU, wanted=wanted)
    assert set(measured(found, *clip)) == {"temporal_flickering", "proxy.interp_gain"}
    assert set(found.absent()) == {"vbench.aesthetic_quality"}


def test_a_folder_without_size_judge_or_prompts(clip):
    found = VideoScores(None, None, [], CPU)
    absent = found.absent()
    assert absent["guard.size"] == "no size was asked for"
    assert absent["proxy.naturalness_niqe_indomain"] == absent["proxy.frame_consistency_clip_indomain"] == NO_JUDGE
    assert absent["vision_reward"] == "no prompts were given"
    rows = measured(found, clip[0], None, None)
    assert set(rows) | set(absent) == (OF_VIDEOS | SETS) - set(FIDELITY)


def test_what_no_prompt_promises_is_absent(passing, clip):
    frames, _, reference = clip
    found = scores(passing, [Prompt("p", "a red circle", {"color": "red", "shape": "circle"})])
    absent = found.absent()
    assert absent["oracle.direction"] == absent["judge.direction"] == "no prompt promises a direction"
    assert absent["oracle.velocity_error"] == "no prompt promises a direction and a speed"
    assert absent["oracle.count"] == "no prompt promises a number of things"
    free = scores(passing, [Prompt("p", "a cat", {})])
    assert free.absent()["oracle.all"] == "no prompt says what its video must show"
    rows = measured(free, frames, Prompt("p", "a cat", {}), reference)
    assert set(rows) | set(free.absent()) == OF_VIDEOS
    assert free.absent()[RETRIEVAL] == "fewer than two of the prompts are texts that the judge can read"
    assert rows["proxy.text_alignment_clip_indomain"].reason == "undefined: the judge never read 'cat'"


def test_a_prompt_in_other_words_cannot_be_swapped(passing, clip):
    frames, prompt, reference = clip
    other = Prompt("p", f"{prompt.text} and turns clockwise", prompt.attributes)
    rows = measured(scores(passing, [other]), frames, other, reference)
    reason = "undefined: the prompt is not the grammar's sentence for its attributes, so no color can be swapped"
    assert rows["judge.color"].reason == reason


def test_without_reference_there_is_no_fidelity(passing, clip):
    frames, prompt, _ = clip
    rows = measured(scores(passing, [prompt]), frames, prompt, None)
    assert OF_VIDEOS - OFFICIAL - set(rows) == {*FIDELITY, RETRIEVAL, STATIC}


def test_undefined_for_this_video(passing, clip):
    """Blank frames: some metrics have nothing to look at, and say so."""
    _, prompt, _ = clip
    blank = torch.full((9, 32, 32, 3), 90, dtype=torch.uint8)
    rows = measured(scores(passing, [prompt]), blank, prompt, blank)
    assert rows["proxy.naturalness_niqe_indomain"].reason == "undefined: no patch of the video has texture"
    assert rows["proxy.interp_gain"].reason.startswith("undefined: nothing moves: every judged frame equals")
    assert rows["guard.static"].value == rows["guard.blank"].value == 1
    assert rows["fidelity.psnr"].value == 100
    assert {rows[f"oracle.{name}"].value for name in ("presence", "all", *JUDGED, "speed", "count")} == {0.0}
    assert rows["oracle.velocity_error"].reason == "undefined: no thing was found"


def test_a_single_frame(passing, clip):
    frames, prompt, reference = clip
    rows = measured(scores(passing, [prompt]), frames[:1], prompt, reference[:1])
    assert rows["temporal_flickering"].reason == "undefined: temporal flickering needs two frames"
    assert rows["proxy.motion_smoothness_dis"].reason == "undefined: motion smoothness needs three frames"
    assert rows["proxy.flow_top5"].reason == "undefined: dynamic degree needs three frames at 8 per second, got 1"
    assert rows["proxy.frame_consistency_clip_indomain"].reason == "undefined: frame consistency needs two frames"
    assert rows["guard.size"].value == 1


def test_canonical_masks_are_the_renderer_s_shapes():
    masks = canonical_masks()
    assert set(masks) == set(grammar.SHAPES)
    for name, mask in masks.items():
        assert 0.1 < mask.mean() < 0.6, name
        assert not mask[[0, -1]].any(), name
        assert np.allclose(mask, mask[:, ::-1]), f"{name} is not upright"


def test_videos_together(passing, clip):
    found = scores(passing, [clip[1]])
    (row,) = found.of_set([clip[0], clip[2], clip[0]])
    assert row.metric == "proxy.kid_indomain"
    assert row.value is not None
    (alone,) = found.of_set([clip[0]])
    assert alone.reason.startswith("undefined: a distance of sets needs two videos")


def test_frame_consistency_keeps_its_order(passing, clip):
    """What 7.4 of the definitions asks: frozen and blank give 1 (the guards say so), a cut in the middle less than clean."""
    judge = scores(passing, [clip[1]]).judge
    frames, other = clip[0].numpy(), clip[2].numpy()
    frozen = np.repeat(frames[:1], len(frames), axis=0)
    assert judge.frame_consistency(frozen) == pytest.approx(1, abs=1e-5)
    assert judge.frame_consistency(np.full_like(frames, 90)) == pytest.approx(1, abs=1e-5)
    half = len(frames) // 2
    cut = np.concatenate([frozen[:half], np.repeat(other[:1], len(frames) - half, axis=0)])
    alternating = np.stack([frozen[0] if t % 2 == 0 else other[0] for t in range(len(frames))])
    assert judge.frame_consistency(alternating) < judge.frame_consistency(cut) < 1
    assert judge.frame_consistency(frames) == judge.frame_consistency(clip[0]), "arrays and tensors are one path"


def test_static_flickering_is_of_prompts_of_rest(passing, clip):
    """The same number as the unfiltered one, for the prompts that promise rest and for no other."""
    frames, prompt, reference = clip
    still = Prompt("s", "a red circle stands still", {"color": "red", "shape": "circle"})
    found = scores(passing, [prompt, still])
    assert STATIC not in found.absent()
    rows = measured(found, frames, still, reference)
    assert rows[STATIC].value == rows["temporal_flickering"].value < 1
    assert STATIC not in measured(found, frames, prompt, reference)
    assert measured(found, frames[:1], still, None)[STATIC].reason == "undefined: temporal flickering needs two frames"
    assert rows["oracle.speed"].value == 0
    assert rows["oracle.velocity_error"].reason == "undefined: the prompt promises no motion"


def test_a_judge_without_speeds_leaves_a_reason(passing, clip, tmp_path):
    shutil.copytree(passing, tmp_path / "judge")
    gates = json.loads((tmp_path / "judge/gates.json").read_text())
    (tmp_path / "judge/gates.json").write_text(json.dumps(gates | {"speeds": {}}))
    absent = scores(tmp_path / "judge", [clip[1]]).absent()
    assert absent["oracle.speed"] == absent["oracle.velocity_error"] == NO_SPEEDS
    assert "oracle.count" not in absent


def test_retrieval_compares_with_every_other_text_of_the_study(passing, clip):
    """One text is the best of all for a video, and only its prompts are right: the same text twice is no competitor."""
    frames, *_ = clip
    prompts = [
        Prompt(f"{color} {direction}", grammar.caption(words), words)
        for color in ("red", "blue")
        for direction in ("left", "up")
        for words in [{"color": color, "shape": "square", "direction": direction}]
    ]
    found = scores(passing, [*prompts, prompts[0], Prompt("x", "a cat", {})])
    right = [measured(found, frames, one, None)[RETRIEVAL].value for one in prompts]
    cosines = [measured(found, frames, one, None)["proxy.text_alignment_clip_indomain"].value for one in prompts]
    assert right == [float(value == max(cosines)) for value in cosines]
    assert sum(right) == 1
    assert measured(found, frames, Prompt("x", "a cat", {}), None)[RETRIEVAL].reason.startswith("undefined: the judge")
