"""A published study: enough to draw it again, and nothing that is large or secret."""

import shutil
import sys

import pytest
from conftest import FIGURES, draw_figure

from sla2.errors import UserError
from sla2.record import read_records
from sla2_eval import publish


def run(monkeypatch, study, output):
    monkeypatch.setattr(sys, "argv", ["publish", str(study), "--output", str(output)])
    publish.main()


def test_a_published_study_draws_every_figure_again(study, figures, tmp_path, monkeypatch):
    run(monkeypatch, study, tmp_path / "public")
    for script in sorted(FIGURES.glob("*.py")):
        draw_figure(script, tmp_path / "public", tmp_path / script.stem)
        drawn = (tmp_path / f"{script.stem}.svg").read_bytes()
        assert drawn == (figures / f"{script.stem}.svg").read_bytes()
        assert drawn == (tmp_path / f"public/figures/{script.stem}.svg").read_bytes()


def test_what_goes_and_what_stays(study, figures, tmp_path, monkeypatch):
    copy = tmp_path / "study"
    shutil.copytree(study, copy)
    for name in ("stage2/full/seed0/transformer/x.safetensors", "base_model/pipeline/vae/x.safetensors"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"weights")
    run(monkeypatch, copy, tmp_path / "public")
    went = {
        path.relative_to(tmp_path / "public").as_posix() for path in (tmp_path / "public").rglob("*") if path.is_file()
    }
    assert {"tables/claims.csv", "score/sla2-97.csv.gz", "latency/latency.csv.provenance.json"} <= went
    assert {"generate/full/seed0/lossless/p02-s0.mkv", "generate/full/seed0/videos/p02-s0.mp4"} <= went
    assert not [
        name
        for name in went
        if "seed1/lossless" in name or "p03" in name or "transformer" in name or "pipeline" in name
    ]


def test_scores_are_packed_and_read_as_they_were(study, tmp_path, monkeypatch):
    for name in ("one", "two"):
        run(monkeypatch, study, tmp_path / name)
    packed = tmp_path / "one/score/full.csv.gz"
    assert read_records(packed) == read_records(study / "score/full.csv")
    assert packed.read_bytes() == (tmp_path / "two/score/full.csv.gz").read_bytes()
    assert not packed.with_name("full.csv").exists()


def test_what_is_too_large_or_absent_is_refused(study, tmp_path, monkeypatch):
    copy = tmp_path / "study"
    shutil.copytree(study, copy)
    large = copy / "stage2/full/seed0/log.csv"
    kept = large.read_bytes()
    large.write_bytes(b"0" * (5 * 10**6 + 1))
    with pytest.raises(UserError, match=r"stage2/full/seed0/log\.csv: 5\.0 MB, a published file has 5 at most"):
        run(monkeypatch, copy, tmp_path / "public")
    large.write_bytes(kept)
    next(copy.glob("generate/full/seed0/videos/p01-s0.mp4")).unlink()
    with pytest.raises(UserError, match=r"p01-s0\.mp4: missing"):
        run(monkeypatch, copy, tmp_path / "public")
    with pytest.raises(UserError, match=r"study\.json"):
        run(monkeypatch, tmp_path, tmp_path / "public")
    assert not (tmp_path / "public").exists()
