"""The search over stage 1: every run is there with its curve, finished ones are not made again, and the gap is computed right."""

import csv
import sys
from pathlib import Path

import pytest
from training_run import make_base

from sla2 import stage1_search
from sla2.config import load_study
from sla2.variant import ROUTERS

ROOT = Path(__file__).resolve().parents[1]


def test_runs_name_what_exists():
    known = load_study(ROOT / "config/tiny.yaml").config["stage1"]
    for name, changes in stage1_search.RUNS.items():
        assert set(changes) <= {"router", *known}, name
        assert changes.get("router", "learned") in ROUTERS


def test_search(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    config = str(ROOT / "tests/workflow/micro.yaml")
    monkeypatch.setattr(stage1_search, "RUNS", {"mean_pool": {"router": "mean_pool"}, "mass": {"estimator": "mass"}})
    command = [
        "x",
        "--config",
        config,
        "--base",
        str(base),
        "--output",
        str(tmp_path),
        "--sparsity",
        "0.5",
        "--steps",
        "5",
    ]
    monkeypatch.setattr(sys, "argv", command)
    stage1_search.main()
    with (tmp_path / "50/search.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"]) for row in rows] == [(r, str(s)) for r in ("mean_pool", "mass") for s in range(6)]
    assert rows[0]["hard_error"] == rows[6]["hard_error"]  # both start as the heuristic
    assert rows[6]["estimator"] == "mass"
    written = (tmp_path / "50/search.md").read_text()
    monkeypatch.setattr(stage1_search, "fit", lambda *rest: pytest.fail("a finished run is made again"))
    stage1_search.main()
    assert (tmp_path / "50/search.md").read_text() == written


def test_gap_closed():
    found = {
        ("learned", "trained"): 0.4,
        ("mean_pool", "fitted"): 0.5,
        ("random", "fitted"): 0.9,
        ("oracle", "fitted"): 0.3,
    }
    text = stage1_search.markdown([("mass", [(0, 0.5), (5, 0.42)], found)])
    assert "| mass | 0.5000 | 0.4200 | 0.4000 | 50% |" in text.splitlines()
    assert text.splitlines()[0].count("|") == text.splitlines()[1].count("|")
