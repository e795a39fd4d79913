"""Provenance of a result that was computed by a copy without git's books, as on a machine that only got the files."""

import subprocess

from sla2 import record
from sla2.files import read_json


def test_a_copy_without_a_checkout_is_told_its_commit(tmp_path, monkeypatch):
    absent = subprocess.CompletedProcess([], returncode=128, stdout="", stderr="")
    monkeypatch.setattr(record.subprocess, "run", lambda *_, **__: absent)
    found = {}
    for commit in ("", "abc"):
        monkeypatch.setenv("SLA2_COMMIT", commit)
        record.write_provenance(tmp_path / "x", {})
        found[commit] = read_json(tmp_path / "x.provenance.json")["git"]
    assert found == {"": {}, "abc": {"commit": "abc", "dirty": None}}


def test_the_command_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/opt/x/score.py", "--output", str(tmp_path / "scores"), "results/tiny"])
    record.write_provenance(tmp_path / "x", {})
    assert read_json(tmp_path / "x.provenance.json")["command"] == ["score.py", "--output", "scores", "results/tiny"]
