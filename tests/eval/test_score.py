"""Step score by its command: records of a tiny folder of videos, complete, and refused where files do not fit."""

import json
import shutil

import pytest
import torch
from conftest import VIDEO

from sla2 import grammar
from sla2.data import Clips
from sla2.errors import UserError
from sla2.record import read_records
from sla2.video import read_video, write_lossless
from sla2_eval import score
from sla2_eval.metrics.catalogue import METRICS
from sla2_eval.metrics.fidelity import fidelity

ROWS = {
    "base": {"variant": "base", "attention": "full", "router": "none", "mixing": "none", "sparsity": 0.0},
    "mine": {"variant": "mine", "attention": "sla2", "router": "mean_pool", "mixing": "sum", "sparsity": 0.9},
}
SETTINGS = {
    "study": "tiny",
    "seed": 0,
    "device": "cpu",
    "threads": 1,
    "video": VIDEO,
    "attention": {"block_q": 16, "block_k": 8},
    "attention_clips": 1,
    "attention_sigmas": [0.5],
    "official": {},
}


@pytest.fixture(scope="module")
def videos(judge_data, tmp_path_factory):
    """Two prompts' videos of two variants, the second one's noise of another kind for prompt p1."""
    folder = tmp_path_factory.mktemp("generate")
    clips = Clips(judge_data / "heldout.jsonl", VIDEO)
    sheet = ["prompt_id\ttext\tattributes"]
    for number in range(2):
        words = {n: grammar.attributes(clips.scenes[number])[n] for n in ("color", "shape", "direction")}
        sheet.append(f"p{number}\t{grammar.caption(words)}\t{json.dumps(words)}")
    (folder / "prompts.tsv").write_text("\n".join(sheet) + "\n")
    for variant in ROWS:
        lines = []
        for number in range(2):
            name = f"lossless/p{number}-s0.mkv"
            write_lossless(folder / variant / "seed0" / name, clips[number].frames, VIDEO["fps"])
            noise = "other" if variant == "mine" and number == 1 else "same"
            entry = {"prompt_id": f"p{number}", "seed": 0, "file": name, "noise_sha256": noise}
            lines.append(json.dumps(entry))
        (folder / variant / "seed0/manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(variant, videos, base_file, judge_folder, output, *, folders=("seed0",), trained=()):
    row = ROWS[variant] | {"quantization": "none", "finetune": False}
    arguments = ["--settings", json.dumps(SETTINGS | {"variant": row}), "--base", base_file]
    arguments += ["--videos", *(videos / variant / name for name in folders), "--reference", videos / "base/seed0"]
    arguments += ["--trained", *trained, "--judge", judge_folder, "--prompts", videos / "prompts.tsv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["score", *map(str, arguments), "--output", str(output)])
        score.main()
    return read_records(output)


@pytest.fixture(scope="module")
def records(videos, base_file, judge_folder, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("score")
    return {name: run(name, videos, base_file, judge_folder, folder / f"{name}.csv") for name in ROWS}


@pytest.mark.parametrize("variant", ROWS)
def test_every_metric_is_a_value_or_a_reason(records, variant):
    imported = {name for name in METRICS if name.startswith("vbench_official.")}
    assert {record.metric for record in records[variant]} == set(METRICS) - imported
    for record in records[variant]:
        assert (record.value is None) == bool(record.reason), record
        assert (record.study, record.variant) == ("tiny", variant)
        about = METRICS[record.metric]
        assert (record.unit, record.higher_is_better) == (about.unit, about.higher_is_better)


def test_fidelity_is_to_the_same_noise(records):
    found = {(r.metric, r.prompt_id): r for r in records["mine"]}
    assert found["fidelity.psnr", "p0"].value == 100
    assert found["fidelity.ssim", "p0"].value == pytest.approx(1)
    assert found["fidelity.psnr", "p1"].value is None
    assert found["fidelity.psnr", "p1"].reason.endswith("seed0 has no video of this prompt, seed and noise")


def test_the_reference_has_no_fidelity_to_itself(records):
    found = [r for r in records["base"] if r.metric.startswith("fidelity.")]
    assert [r.reason for r in found] == ["these videos are the reference of fidelity"] * 3


def test_the_floor_is_the_next_seed_of_the_dense_model(records, videos, tmp_path):
    found = [r for r in records["base"] if r.metric in ("floor.psnr", "floor.ssim")]
    assert {r.reason for r in found} == {"undefined: the study has one sampling seed"}
    assert {r.reason for r in records["mine"] if r.metric.startswith("floor.")} == {
        "measured on the untouched dense model only"
    }
    folder = tmp_path / "seed0"
    shutil.copytree(videos / "base/seed0", folder)
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    lines = [json.dumps(entry | {"prompt_id": "p0", "seed": seed}) for seed, entry in enumerate(entries)]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    first, second = (json.loads(line) for line in lines)
    frames, other = (read_video(folder / entry["file"])[0] for entry in (first, second))
    rows = {m.metric: m.value for m in score.noise_floor(folder, first, frames)}
    assert rows["floor.psnr"] == pytest.approx(fidelity(frames.numpy(), other.numpy())["fidelity.psnr"])
    assert 5 < rows["floor.psnr"] < 40
    again = {m.metric: m.value for m in score.noise_floor(folder, second, other)}
    assert again == pytest.approx(rows)


def test_attention_is_per_layer(records):
    layers = {(r.metric, r.layer): r.value for r in records["mine"] if r.layer is not None}
    assert {layer for _, layer in layers} == {0, 1}
    assert 0 < layers["attention.rel_l1", 0] < 2
    alpha = [r for r in records["mine"] if r.metric == "attention.alpha_error"]
    assert [r.reason for r in alpha] == ["undefined: mixing 'sum' has no alpha"]
    floor = {r.layer: r.value for r in records["base"] if r.metric == "floor.attention_rel_l1"}
    assert set(floor) == {0, 1}
    assert all(0 <= value < 1e-5 for value in floor.values())
    dense = {r.metric: r for r in records["base"]}
    assert dense["sparsity.realised"].value == 0
    assert dense["attention.rel_l1"].reason == "dense attention is what errors are measured against"


def test_provenance_stands_beside(videos, base_file, judge_folder, tmp_path):
    run("base", videos, base_file, judge_folder, tmp_path / "base.csv")
    beside = json.loads((tmp_path / "base.csv.provenance.json").read_text())
    assert beside["judge_sha256"] == json.loads((judge_folder / "gates.json").read_text())["weights_sha256"]
    assert len(beside["manifests"]) == 1


def test_files_that_do_not_fit_are_refused(videos, base_file, judge_folder, tmp_path):
    output = tmp_path / "base.csv"
    with pytest.raises(UserError, match=r"--trained: 3 folders for 2 of --videos; give none, one, or one each"):
        run("base", videos, base_file, judge_folder, output, folders=("seed0", "seed1"), trained="abc")
    with pytest.raises(UserError, match=r"manifest.jsonl: missing; run the generate step"):
        run("base", videos, base_file, judge_folder, output, folders=("seed7",))
    (videos / "base/run7").mkdir()
    with pytest.raises(UserError, match="is named seed and a number, such as seed0"):
        run("base", videos, base_file, judge_folder, output, folders=("run7",))
    assert not output.exists()
