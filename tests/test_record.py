"""Records with their status, and provenance of a result that was computed by a copy without git's books."""

import subprocess

import pytest

from sla2 import record
from sla2.errors import UserError
from sla2.files import read_json
from sla2.record import Record, read_records, write_records


@pytest.mark.parametrize("checkout", [False, True])
def test_a_copy_is_told_its_commit(tmp_path, monkeypatch, checkout):
    """Also a copy that lies in a checkout of something older, as on a machine that was sent the files alone."""
    answer = subprocess.CompletedProcess([], returncode=0 if checkout else 128, stdout="old", stderr="")
    monkeypatch.setattr(record.subprocess, "run", lambda *_, **__: answer)
    found = {}
    for commit in ("", "abc"):
        monkeypatch.setenv("SLA2_COMMIT", commit)
        record.write_provenance(tmp_path / "x", {})
        found[commit] = read_json(tmp_path / "x.provenance.json")["git"]
    assert found == {"": {"commit": "old", "dirty": True} if checkout else {}, "abc": {"commit": "abc", "dirty": None}}


def test_the_command_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/opt/x/score.py", "--output", str(tmp_path / "scores"), "results/tiny"])
    record.write_provenance(tmp_path / "x", {})
    assert read_json(tmp_path / "x.provenance.json")["command"] == ["score.py", "--output", "scores", "results/tiny"]


@pytest.fixture
def written(tmp_path):
    """Records with a value, without one that is defined, and without what measures it; and their file."""
    about = {"study": "s", "variant": "v", "metric": "m"}
    made = [
        Record(value=0.0, reason="1 frame was skipped", **about),
        Record(value=None, reason="undefined: one frame", **about),
        Record(value=None, reason="not available: needs the weights x.pth", **about),
    ]
    write_records(tmp_path / "r.csv", made)
    return made, tmp_path / "r.csv"


def test_status_says_what_kind_of_reason_it_is(written):
    made, path = written
    assert [one.status for one in made] == ["ok", "undefined", "not_available"]
    assert read_records(path) == made
    lines = path.read_text().splitlines()
    place = lines[0].split(",").index("status")
    assert [line.split(",")[place] for line in lines[1:]] == ["ok", "undefined", "not_available"]


def test_a_status_that_does_not_fit_is_refused(written):
    _, path = written
    path.write_text(path.read_text().replace("undefined,undefined: one", "ok,undefined: one"))
    with pytest.raises(UserError, match=r"r.csv:3: status 'ok' with value '' .* that is 'undefined'"):
        read_records(path)


def test_records_published_without_a_status_are_read(written):
    made, path = written
    text = path.read_text().replace("backend,status,", "backend,")
    for status in ("ok", "undefined", "not_available"):
        text = text.replace(f",{status},", ",")
    path.write_text(text)
    assert read_records(path) == made
