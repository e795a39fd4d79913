"""The rehearsal: every step of the workflow on random weights of the real classes, given by path, at a size of seconds."""

import csv
import runpy
import sys

import pytest
import yaml
from safetensors import safe_open

from sla2 import rehearsal


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Folders of a rehearsal; its commands run in this process, where the libraries are imported once."""
    folder = tmp_path_factory.mktemp("rehearsal")
    with open("config/wan2.1-1.3b-480p.yaml") as file:
        config = yaml.safe_load(file)
    changes = {
        "variants": {"sheet": "config/variants.tsv", "rows": ["base", "full", "sla2-85", "sla2-90"]},
        "attention": {"block_q": 8, "block_k": 4},
        "device": "cpu",
        "threads": 1,
    }
    config |= changes
    config["data"]["video"] = {"frames": 9, "height": 64, "width": 64, "fps": 8}
    config["base_model"]["text_length"] = 64
    config["stage1"]["query_blocks"] = 2
    config["stage2"]["headline"] = {"rows": ["full"], "seeds": 2}
    config["score"]["naturalness_patch"] = 8
    config["score"]["judge"]["frame_size"] = 16
    (folder / "study.yaml").write_text(yaml.safe_dump(config))

    def run(self, name, command):
        patch.setattr(sys, "argv", command[1:])
        runpy.run_module(command[1], run_name="__main__")

    sizes = ["--size", "tiny", "--forward-size", "tiny", "--forward-config", str(folder / "study.yaml")]
    rows = ["--row", "sla2-90", "--rows", "sla2-90"]
    folders = ["--work", str(folder / "work"), "--output", str(folder / "output")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal.Rehearsal, "run", run)
        patch.setattr(sys, "argv", ["rehearsal", str(folder / "study.yaml"), *sizes, *rows, *folders])
        rehearsal.main()
    return folder / "work", folder / "output"


def test_summary_has_steps_costs_and_speed_ups(done):
    with (done[1] / "summary.csv").open(newline="") as file:
        rows = {row["quantity"]: row for row in csv.DictReader(file)}
    for name in ("stage1_step_s", "stage2_step_s", "stage2_data_wait_share", "generate_clip_s", "train_step_sla2_90_s"):
        assert float(rows[name]["value"]) >= 0, name
    for kind in ("train_step", "forward_tiny"):
        seconds = [float(rows[f"{kind}_{row}_s"]["value"]) for row in ("dense_fa2", "sla2_90")]
        speedup = float(rows[f"{kind}_speedup_90_over_fa2"]["value"])
        assert speedup == pytest.approx(seconds[0] / seconds[1], rel=1e-4)


def test_steps_ran_on_the_weights_given_by_path(done):
    results = done[0] / "results"
    assert (results / "generate/sla2-90/seed0/manifest.jsonl").read_text().count("\n") == 1
    with safe_open(next((results / "stage2/sla2-90/seed0/transformer").glob("*.safetensors")), "pt") as file:
        keys = set(file.keys())
    with safe_open(next((done[0] / "random-wan/transformer").glob("*.safetensors")), "pt") as file:
        assert keys == set(file.keys())  # an ordinary diffusers folder: what the variant adds is in the adapter alone
    rows = list(csv.DictReader((done[1] / "stage2.csv").open(newline="")))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert all(0 <= float(row["data_seconds"]) <= float(row["seconds"]) for row in rows)


def test_a_failed_command_is_logged_and_leaves_its_figure_empty(tmp_path):
    class Arguments:
        work, output, minutes = tmp_path, tmp_path, 1

    run = rehearsal.Rehearsal(Arguments)
    assert not run.run("stage1", ["-c", "print('no room'); raise SystemExit(3)"])
    assert "stage1_s,,s" in (tmp_path / "summary.csv").read_text()
    assert "no room" in (tmp_path / "run.log").read_text()
    assert "failed, exit status 3" in (tmp_path / "run.log").read_text()
    assert run.run("data", ["-c", "pass"])
    assert rehearsal.Summary(tmp_path / "summary.csv").rows.keys() == {"stage1_s", "data_s"}
