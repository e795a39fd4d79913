"""Scenes, clips and video files."""

import json
import subprocess
import sys

import pytest
import torch

from sla2 import scenes
from sla2.data import SPLITS, Clips, from_folder, procedural
from sla2.errors import UserError
from sla2.render import render
from sla2.video import fit, read_video, resample, write_lossless, write_mp4

VIDEO = {"frames": 9, "height": 64, "width": 64, "fps": 8}


def settings(**changes):
    clips = {"train": 20, "heldout": 5, "judge": 5, "judge_heldout": 5}
    return {
        "seed": 0,
        "threads": 2,
        "folder": None,
        "on_error": "stop",
        "clips": clips,
        "scene": {},
        "video": VIDEO,
        **changes,
    }


def test_splits_are_disjoint():
    splits = procedural(settings(clips={"train": 300, "heldout": 100, "judge": 100, "judge_heldout": 100}))
    drawn = [json.dumps(entry["scene"], sort_keys=True) for entries in splits.values() for entry in entries]
    assert len(set(drawn)) == 600


def test_withheld_captions_are_not_trained_on():
    seen = [entry["caption"] for entry in procedural(settings())["train"]]
    held = procedural(settings(withheld=[seen[0], seen[3]]))
    captions = [entry["caption"] for entry in held["train"]]
    assert len(captions) == 20
    assert not {seen[0], seen[3]} & set(captions)
    kept = [caption for caption in seen if caption not in (seen[0], seen[3])]
    assert captions[: len(kept)] == kept
    assert held["heldout"] == procedural(settings())["heldout"]
    everything = {entry["caption"] for entry in procedural(settings(clips=dict.fromkeys(SPLITS, 3000)))["train"]}
    with pytest.raises(UserError, match="hold_out_prompts"):
        procedural(settings(withheld=sorted(everything)))


def clip(frames: int, height: int, width: int):
    video = {"frames": frames, "height": height, "width": width, "fps": 8}
    return render([scenes.sample(scenes.SIMPLE, video, 0, "train", 1)], **video)[0]


def test_lossless_video_is_exact_and_h264_is_close(tmp_path):
    frames = clip(9, 48, 64)
    write_lossless(tmp_path / "a.mkv", frames, 8)
    write_mp4(tmp_path / "a.mp4", frames, 8)
    found, fps = read_video(tmp_path / "a.mkv")
    assert torch.equal(found, frames)
    assert fps == 8
    close, fps = read_video(tmp_path / "a.mp4")
    assert fps == 8
    assert 0 < (close.float() - frames.float()).abs().mean() < 6


def test_reading_stops_after_the_seconds_that_are_wanted(tmp_path):
    frames = clip(17, 48, 64)
    write_lossless(tmp_path / "a.mkv", frames, 8)
    found, _ = read_video(tmp_path / "a.mkv", seconds=1.0)
    assert torch.equal(found, frames[:9])


def test_resample_takes_the_nearest_frame_or_none():
    frames = torch.arange(25, dtype=torch.uint8).view(-1, 1, 1, 1).expand(25, 2, 2, 3)
    assert resample(frames, 25, 10, 5)[:, 0, 0, 0].tolist() == [0, 2, 5, 8, 10]
    assert resample(frames, 25, 10, 12) is None


def test_fit_covers_and_crops():
    frames = torch.zeros(2, 50, 100, 3, dtype=torch.uint8)
    frames[:, :, 25:75] = 200
    out = fit(frames, 32, 32)
    assert out.shape == (2, 32, 32, 3)
    assert out.float().mean() > 190


@pytest.fixture
def folder(tmp_path):
    frames = clip(17, 64, 80)
    names = [f"{letter}.mp4" for letter in "abcdef"]
    for name in names:
        write_mp4(tmp_path / name, frames, 8)
    write_mp4(tmp_path / "short.mp4", frames[:4], 8)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    rows = [f"{name},a clip" for name in names]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *rows]) + "\n")
    return tmp_path


def test_folder_is_split_and_read_like_scenes(folder, tmp_path):
    splits, skipped = from_folder(
        settings(folder=str(folder), clips={"train": 9, "heldout": 2, "judge": 0, "judge_heldout": 0})
    )
    assert (len(splits["train"]), len(splits["heldout"]), skipped) == (4, 2, [])
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in splits["train"]))
    clips = Clips(path, VIDEO)
    assert clips.batch([0, 1]).shape == (2, 9, 64, 64, 3)
    assert clips[0].caption == "a clip"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("short.mp4,x", "lasts 0.50 s, 1.12 s are needed"),
        ("broken.mp4,x", "cannot be read"),
        ("a.mp4,", "has no caption"),
    ],
)
def test_unusable_clip_stops_or_is_counted(folder, row, message):
    with (folder / "captions.csv").open("a") as file:
        file.write(row + "\n")
    clips = {"train": 9, "heldout": 2, "judge": 0, "judge_heldout": 0}
    with pytest.raises(UserError, match=message):
        from_folder(settings(folder=str(folder), clips=clips))
    _, skipped = from_folder(settings(folder=str(folder), clips=clips, on_error="skip"))
    assert len(skipped) == 1
    assert message in skipped[0]


def test_step_writes_its_index_and_names_mistakes_in_one_line(tmp_path):
    command = [sys.executable, "-m", "sla2.data", "--output", str(tmp_path / "data"), "--settings"]
    subprocess.run([*command, json.dumps(settings())], check=True, capture_output=True)
    assert len((tmp_path / "data/train.jsonl").read_text().splitlines()) == 20
    assert (tmp_path / "data/preview.mp4").stat().st_size > 1000
    answer = subprocess.run(
        [*command, json.dumps(settings(folder="nowhere"))], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert (
        answer.stderr.strip()
        == "error: data.folder: nowhere is no folder; set it to your videos and their captions.csv"
    )
