"""A study beside another run of it: what came out the same, and by how much the rest differs."""

import csv
import json
import shutil
import sys

import pytest

from sla2.errors import UserError
from sla2_eval import compare, publish


@pytest.fixture
def public(study, tmp_path, monkeypatch):
    """The invented study as `sla2 publish` leaves it."""
    monkeypatch.setattr(sys, "argv", ["publish", str(study), "--output", str(tmp_path / "public")])
    publish.main()
    return tmp_path / "public"


def of(lines, what, row):
    return next(line for line in lines if (line.what, line.row) == (what, row))


def test_a_study_is_as_it_was_published(study, public):
    lines = compare.compare(study, public)
    assert {line.what for line in lines} == {"stage1", "stage2", "weights", "videos", "scores"}
    assert all(line.equal == line.compared > 0 and not line.missing and not line.where for line in lines)


def test_what_differs_is_named_with_its_size(study, public, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "again"
    shutil.copytree(study, copy)
    log = next(copy.glob("stage2/full/seed*/log.csv"))
    first, *rest = log.read_text().splitlines()
    value = float(rest[0].rsplit(",", 1)[1])
    log.write_text("\n".join([first, f"{rest[0].rsplit(',', 1)[0]},{value + 0.25!r}", *rest[1:]]) + "\n")
    manifest = copy / "generate/full/seed0/manifest.jsonl"
    clips = [json.loads(line) for line in manifest.read_text().splitlines()]
    clips[0]["sha256"] = "0" * 64
    manifest.write_text("".join(json.dumps(clip) + "\n" for clip in clips[:-1]))
    (copy / "score/sla2-97.csv").unlink()

    lines = compare.compare(copy, public)
    loss = of(lines, "stage2", "full")
    assert loss.equal == loss.compared - 1
    assert loss.largest_difference == pytest.approx(0.25)
    assert loss.where.startswith(log.parent.name)
    seen = of(lines, "videos", "full")
    whole = of(compare.compare(study, public), "videos", "full")
    assert (seen.compared, seen.equal, seen.missing) == (whole.compared - 1, whole.compared - 2, 1)
    assert seen.where == f"seed0 {clips[0]['id']}"
    assert seen.largest_difference is None
    lost = of(lines, "scores", "sla2-97")
    assert lost.compared == 0
    assert lost.missing > 0
    assert all(line.equal == line.compared for line in lines if line.what == "weights")

    output = tmp_path / "compared.csv"
    monkeypatch.setattr(sys, "argv", ["compare", str(copy), str(public), "--output", str(output)])
    compare.main()
    rows = list(csv.DictReader(output.open()))
    assert len(rows) == len(lines)
    assert rows[0].keys() >= {"what", "row", "equal", "largest_difference"}
    said = "".join(capsys.readouterr())
    assert "by 0.25 at most" in said
    assert f"videos full: {seen.equal} of {seen.compared} equal" in said


def test_nothing_to_compare_is_refused(study, public, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        compare.compare(tmp_path / "none", public)
    with pytest.raises(UserError, match=r"study\.json"):
        compare.compare(study, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no row in common"):
        compare.compare(tmp_path / "empty", public)
