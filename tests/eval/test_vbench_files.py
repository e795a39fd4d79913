"""Export for VBench and import of its results: what goes out comes back, and what does not fit is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from clips import moving_disc

from sla2.errors import UserError
from sla2.record import read_records
from sla2.video import write_lossless, write_mp4
from sla2_eval import vbench_files
from sla2_eval.vbench_files import DIMENSIONS


def run(command, *arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sla2-eval", *map(str, arguments)])
        command()


def generate(folder, finetune: bool) -> None:
    """A generated folder of two prompts and two seeds, one clip shorter than the others."""
    lines = []
    for prompt in range(2):
        for seed in range(2):
            name = f"p{prompt}x-s{seed}"
            frames = moving_disc(2 * prompt + seed)[: 9 if prompt else 17]
            write_mp4(folder / "videos" / f"{name}.mp4", torch.from_numpy(frames), 16)
            entry = {
                "id": name,
                "prompt_id": f"p{prompt}x",
                "seed": seed,
                "text": f"prompt {prompt}",
                "noise_sha256": "n",
            }
            lines.append(json.dumps(entry))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"train_seed": int(folder.name.removeprefix("seed")), "variant": {"finetune": finetune}}
    (folder / "manifest.jsonl.provenance.json").write_text(json.dumps({"settings": settings}))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Videos of a fine-tuned row, exported."""
    folder = tmp_path_factory.mktemp("s") / "study" / "generate" / "full" / "seed1"
    generate(folder, finetune=True)
    out = tmp_path_factory.mktemp("out") / "export"
    run(vbench_files.export_main, folder, "--out", out)
    return out


def results(exported, change=lambda found: None) -> dict:
    """What VBench would write, with known values per video."""
    names = sorted(path.name for path in (exported / "videos").iterdir())
    found = {}
    for place, dimension in enumerate(reversed(DIMENSIONS)):
        values = [0.1 * place + 0.01 * number for number in range(len(names))]
        total = sum(values) / len(values)
        if dimension == "imaging_quality":
            values = [100 * value for value in values]
        if dimension == "dynamic_degree":
            values, total = [True, False, True, True], 0.75
        found[dimension] = [
            total,
            [{"video_path": f"/there/videos/{n}", "video_results": v} for n, v in zip(names, values, strict=True)],
        ]
    change(found)
    return found


def imported(exported, tmp_path, found) -> list:
    (tmp_path / "r_eval_results.json").write_text(json.dumps(found))
    run(vbench_files.import_main, exported, "--results", tmp_path / "r_eval_results.json", "--out", tmp_path / "r.csv")
    return read_records(tmp_path / "r.csv")


def test_folder_is_what_vbench_reads(exported):
    names = sorted(path.name for path in (exported / "videos").iterdir())
    assert names == ["p0000-s0.mp4", "p0000-s1.mp4", "p0001-s0.mp4", "p0001-s1.mp4"]
    assert json.loads((exported / "prompts.json").read_text()) == {n: f"prompt {n[4]}" for n in names}
    manifest = vbench_files.read_manifest(exported)
    assert manifest["p0001-s1.mp4"]["frames"] == 9
    assert manifest["p0001-s1.mp4"]["fps"] == 16
    assert manifest["p0000-s0.mp4"]["variant"] == "full"
    assert manifest["p0000-s0.mp4"]["study"] == "study"
    assert manifest["p0000-s0.mp4"]["row"] == {"finetune": True}


def test_command_refuses_another_commit(exported, tmp_path):
    place = tmp_path / "VBench"
    place.mkdir()
    git = ["git", "-C", place, "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run(["git", "init", "-q", place], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    answer = subprocess.run(
        ["sh", exported / "run_vbench.sh"], env=os.environ | {"VBENCH": str(place)}, capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert answer.stderr.strip() == f"error: {place} is not at commit {vbench_files.COMMIT}"
    script = (exported / "run_vbench.sh").read_text()
    assert "--mode custom_input" in script
    assert script.rstrip().endswith("--dimension " + " ".join(DIMENSIONS))


def test_round_trip(exported, tmp_path):
    records = imported(exported, tmp_path, results(exported))
    assert len(records) == len(DIMENSIONS) * 4
    found = {(r.metric, r.prompt_id, r.seed): r for r in records}
    place = list(reversed(DIMENSIONS)).index("imaging_quality")
    one = found["vbench_official.imaging_quality", "p1x", 1]
    assert one.value == pytest.approx(0.1 * place + 0.03)
    assert (one.study, one.variant, one.train_seed, one.backend) == ("study", "full", 1, "vbench-45e79ec/custom_input")
    assert [found["vbench_official.dynamic_degree", f"p{p}x", s].value for p in (0, 1) for s in (0, 1)] == [1, 0, 1, 1]


def test_a_row_that_was_not_trained_has_no_training_seed(tmp_path):
    """As in the records of step score, although its folder is called seed0."""
    folder = tmp_path / "study/generate/base/seed0"
    generate(folder, finetune=False)
    assert {entry["train_seed"] for entry in vbench_files.of_study(folder)} == {None}
    (folder / "manifest.jsonl.provenance.json").unlink()
    with pytest.raises(UserError, match=r"manifest.jsonl.provenance.json: missing; .* Run the generate step"):
        vbench_files.of_study(folder)


def test_order_of_dimensions_does_not_matter(exported, tmp_path):
    one = results(exported)
    (tmp_path / "b").mkdir()
    other = imported(exported, tmp_path / "b", dict(reversed(one.items())))
    assert imported(exported, tmp_path, one) == other


def test_a_total_over_frames_is_one_of_vbench_s(exported, tmp_path):
    def by_frame(found):
        values = [video["video_results"] for video in found["subject_consistency"][1]]
        found["subject_consistency"][0] = sum(v * n for v, n in zip(values, (16, 16, 8, 8), strict=True)) / 48

    assert imported(exported, tmp_path, results(exported, by_frame))


def test_both_aggregates_are_told_and_equal_for_one_length(exported, tmp_path, capsys):
    imported(exported, tmp_path, results(exported))
    told = [line for line in capsys.readouterr().err.splitlines() if "over frames" in line]
    assert [line.split(": ")[1] for line in told] == list(vbench_files.BY_FRAME)
    lengths = {"a": {"frames": 17}, "b": {"frames": 9}}
    by_video, by_frame = vbench_files.aggregates({"a": 0.9, "b": 0.6}, lengths)
    assert by_video == pytest.approx(0.75)
    assert by_frame == pytest.approx((0.9 * 16 + 0.6 * 8) / 24)
    same = vbench_files.aggregates({"a": 0.9, "b": 0.6}, {name: {"frames": 17} for name in "ab"})
    assert same == pytest.approx((0.75, 0.75))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["aesthetic_quality"][1].pop(), "aesthetic_quality: 3 videos, exported were 4; such as 'p0001-s1.mp4'"),
        (lambda f: f["aesthetic_quality"][1][0].update(video_path="x.mp4"), "4 videos, exported were 4; such as"),
        (lambda f: f["aesthetic_quality"][1].append(f["aesthetic_quality"][1][0]), "a video stands twice"),
        (lambda f: f["aesthetic_quality"][1][2].update(video_results=float("nan")), "p0001-s0.mp4 is nan, not a number"),
        (lambda f: f["temporal_flickering"].__setitem__(0, float("nan")), "total is nan, not a number"),
        (lambda f: f["motion_smoothness"].__setitem__(0, 0.123), "total 0.123000, its videos have"),
        (lambda f: f.update(scene=[1, []]), "dimension 'scene' is not one of"),
        (lambda f: f.update(imaging_quality={"a": 1}), "imaging_quality: is not"),
        (lambda f: f.clear(), "dimension '' is not one of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(exported, tmp_path, change, message):
    with pytest.raises(UserError) as refused:
        imported(exported, tmp_path, results(exported, change))
    assert message in str(refused.value)
    assert not (tmp_path / "r.csv").exists()


def test_any_folder_with_prompts(tmp_path):
    write_lossless(tmp_path / "v" / "a.mkv", torch.from_numpy(moving_disc(0)), 8)
    write_mp4(tmp_path / "v" / "b.mp4", torch.from_numpy(moving_disc(1)), 8)
    with pytest.raises(UserError, match="is no folder of a generate step; give --prompts"):
        run(vbench_files.export_main, tmp_path / "v", "--out", tmp_path / "e")
    (tmp_path / "p.csv").write_text("video,prompt\na,a cat\n")
    with pytest.raises(UserError, match=r"has no prompt for 'b.mp4' \(1 in all\)"):
        run(vbench_files.export_main, tmp_path / "v", "--prompts", tmp_path / "p.csv", "--out", tmp_path / "e")
    (tmp_path / "p.csv").write_text("video,prompt\na,a cat\nb,a dog\n")
    run(vbench_files.export_main, tmp_path / "v", "--prompts", tmp_path / "p.csv", "--out", tmp_path / "e", "--dimensions", "imaging_quality")  # fmt: skip
    manifest = vbench_files.read_manifest(tmp_path / "e")
    assert [entry["encoded"] for entry in manifest.values()] == ["H.264 yuv420p, CRF 12", "as it was"]
    assert (tmp_path / "e/run_vbench.sh").read_text().rstrip().endswith("--dimension imaging_quality")
    (tmp_path / "e/videos/p0000-s0.mp4").write_bytes(b"another")
    with pytest.raises(UserError, match="is not the file that was exported"):
        vbench_files.read_manifest(tmp_path / "e")
