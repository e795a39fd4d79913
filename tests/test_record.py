"""Provenance of a result that was computed by a copy without git's books, as on a machine that only got the files."""

import subprocess

import pytest

from sla2 import record
from sla2.files import read_json


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
