"""The whole DAG for real on a study of seconds: every step runs, and what it leaves fits together."""

import csv
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from checkouts import PARTS, ROOT, Checkout, copy_checkout

from sla2.files import sha256_folder
from sla2.record import read_records

CONFIG = ("--configfile", "tests/workflow/micro.yaml")
ROWS = {"base": 1, "base-kernel": 1, "full": 1, "sla-95": 1, "sla2-90": 2}
pytestmark = pytest.mark.xdist_group("micro")


@pytest.fixture(scope="session")  # a module's would be made again where a worker waits between two tests
def study(tmp_path_factory) -> Checkout:
    folder = copy_checkout(ROOT, tmp_path_factory.mktemp("micro") / "checkout", PARTS)
    (folder / "tests/workflow").mkdir(parents=True)
    for name in ("micro.yaml", "prompts.tsv"):
        (folder / "tests/workflow" / name).write_bytes((ROOT / "tests/workflow" / name).read_bytes())
    checkout = Checkout(folder)
    checkout.snakemake("ablations", *CONFIG)
    return checkout


@pytest.fixture
def results(study) -> Path:
    return study.folder / "results/micro"


def test_second_run_has_nothing_to_do(study):
    done = study.snakemake("ablations", *CONFIG)
    assert "Nothing to be done" in done.stdout + done.stderr


def test_same_noise_for_every_variant(results):
    noises = []
    for name, seeds in ROWS.items():
        folders = sorted(path.name for path in (results / "generate" / name).iterdir())
        assert folders == [f"seed{seed}" for seed in range(seeds)]
        for folder in folders:
            lines = (results / "generate" / name / folder / "manifest.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            noises.append({(row["prompt_id"], row["seed"]): row["noise_sha256"] for row in rows})
            for row in rows:
                stem = f"{row['prompt_id']}-s{row['seed']}"
                assert (results / "generate" / name / folder / f"videos/{stem}.mp4").stat().st_size
                assert (results / "generate" / name / folder / f"lossless/{stem}.mkv").stat().st_size
    assert len(noises[0]) == 4
    assert len(set(noises[0].values())) == 4
    assert all(noise == noises[0] for noise in noises)


def test_records_of_every_variant(results):
    for name, seeds in ROWS.items():
        records = read_records(results / "score" / f"{name}.csv")
        assert {record.variant for record in records} == {name}
        assert {record.study for record in records} == {"micro"}
        videos = {record.train_seed for record in records if record.metric == "temporal_flickering"}
        assert len(videos) == seeds
    assert {record.variant for record in read_records(results / "latency/latency.csv")} == set(ROWS)


def test_tables_hold_every_variant(results):
    for table in ("quality", "fidelity", "attention", "efficiency", "training", "ablation", "variants"):
        with (results / f"tables/{table}.csv").open(newline="") as file:
            assert list(csv.DictReader(file)), table
    with (results / "tables/ablation.csv").open(newline="") as file:
        assert {row["variant"] for row in csv.DictReader(file)} == set(ROWS)


def test_another_dense_kernel_changes_next_to_nothing(results):
    """Its videos, of the same noise, are measured against those of `base`: the noise floor of fidelity."""
    records = read_records(results / "score/base-kernel.csv")
    psnr = [record.value for record in records if record.metric == "fidelity.psnr"]
    assert len(psnr) == 4
    assert all(40 < value <= 100 for value in psnr)


def test_every_job_left_a_log(results):
    logs = {path.relative_to(results / "logs").as_posix() for path in (results / "logs").rglob("*.log")}
    wanted = {"data.log", "base_model.log", "latency.log", "score/judge.log", "report/tables.log", "report/report.log"}
    wanted |= {
        f"stage2/{name}-seed{seed}.log"
        for name, seeds in ROWS.items()
        for seed in range(seeds)
        if not name.startswith("base")
    }
    wanted |= {"stage1/learned-alpha-90.log"}
    assert wanted <= logs


def test_page_opens_from_disk(results):
    page = (results / "report/index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="/' not in page
    assert list((results / "report").rglob("*.mp4"))


def test_report_archive(study, results):
    study.snakemake("ablations", *CONFIG, "--report", "results/micro/report.zip")
    with zipfile.ZipFile(results / "report.zip") as archive:
        assert any(name.endswith(".mp4") for name in archive.namelist())


def stage2(results: Path, output: Path) -> subprocess.Popen:
    """Stage 2 of a row as the workflow runs it, with steps enough to be killed among them."""
    made = results / "stage2/sla2-90/seed0/adapter.safetensors.provenance.json"
    settings = json.loads(made.read_text())["settings"] | {"steps": 120, "checkpoint_every": 10, "validate_every": 50}
    inputs = ["--base", results / "base_model/base_model.json", "--adapter", results / "stage1/learned-alpha-90"]
    command = [sys.executable, "-m", "sla2.stage2", "--settings", json.dumps(settings), *inputs, "--output", output]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def test_killed_training_ends_as_an_uninterrupted_one(results, tmp_path):
    """`kill -9` half-way; the same command goes on from the last checkpoint, and every weight is the same bit for bit."""
    assert stage2(results, tmp_path / "whole").wait() == 0
    killed, checkpoint = stage2(results, tmp_path / "killed"), tmp_path / "killed/.checkpoint/stage2.safetensors"
    while not checkpoint.is_file():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/adapter.safetensors").exists()
    assert stage2(results, tmp_path / "killed").wait() == 0
    assert not checkpoint.exists()
    assert sha256_folder(tmp_path / "killed", "*.safetensors") == sha256_folder(tmp_path / "whole", "*.safetensors")
    assert (tmp_path / "killed/log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()
