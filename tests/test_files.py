"""Files are whole or absent, whatever stops the writing."""

import errno
import json
import subprocess
import sys

import pytest

from sla2.errors import UserError, run_main
from sla2.files import atomic_path, read_json, settings_hash, sha256_folder, write_atomic, write_folder, write_json


def stopped(path, error):
    """Write half a file, then fail."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half of the ne")
        raise error


def fill_the_disk(path):
    """/dev/full answers as a full disk does."""
    with atomic_path(path), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"new")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights.bin"
    write_atomic(path, b"old")
    with pytest.raises(RuntimeError):
        stopped(path, RuntimeError())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights.bin"
    write_atomic(path, b"old")
    with pytest.raises(UserError, match=r"weights\.bin: the disk is full; free some space"):
        fill_the_disk(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="denied"):
        stopped(tmp_path / "a", OSError(errno.EACCES, "denied"))


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights.bin"
    write_atomic(path, b"old")
    code = "import os, sys; from sla2.files import atomic_path\nwith atomic_path(sys.argv[1]) as t: t.write_bytes(b'new'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_folder_is_swapped_in_whole(tmp_path):
    folder = tmp_path / "pipeline"
    write_folder(folder, lambda f: (f / "a").write_text("old"))

    def fails(f):
        (f / "a").write_text("new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(folder, fails)
    assert (folder / "a").read_text() == "old"
    write_folder(folder, lambda f: (f / "b").write_text("new"))
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_hashes_depend_on_content_and_names_only(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "a.json", {"b": 1, "a": 2})
    assert sha256_folder(tmp_path / "one") == sha256_folder(tmp_path / "two")
    (tmp_path / "two/a.json").rename(tmp_path / "two/b.json")
    assert sha256_folder(tmp_path / "one") != sha256_folder(tmp_path / "two")
    assert settings_hash({"a": 1, "b": 2}) == settings_hash(json.loads('{"b": 2, "a": 1}'))


def test_json_mistakes_name_file_and_remedy(tmp_path):
    with pytest.raises(UserError, match=r"a\.json: missing; run the step"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a: b; c"), 2, "error: a: b; c"),
        (KeyboardInterrupt, 130, "stopped: finished work is kept, the same command resumes"),
    ],
)
def test_steps_end_without_a_traceback(capsys, error, status, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == status
    assert capsys.readouterr().err.strip() == line
